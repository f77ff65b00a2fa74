"""Reduce a loss per token to one number. Variants of GRPO differ in the reduction as often as in the loss itself.

The reduction decides what a token weighs. Under a mean over each sequence, a token of a short completion counts for
more than a token of a long completion. Under a mean over all tokens, a long completion counts for more than a short
completion. A sum divided by a constant does neither, and leaves the size of the gradient to the lengths.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_plus.registry import suggestion

Reduction = Literal[
    "token-mean", "global-token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
"""Ways to turn the losses of tokens into one number, by the name that `loss_reduction` takes."""


def reduce(
    loss: Tensor,
    mask: Tensor,
    how: Reduction,
    *,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Sum the loss over the tokens that count, and divide as `how` says. The names are verl's `loss_agg_mode`.

    | name                    | formula                         | TRL's losses with it            |
    |-------------------------|---------------------------------|---------------------------------|
    | token-mean              | Σᵢₜ lᵢₜ / Σᵢ |oᵢ|               | bnpo                            |
    | global-token-mean       | Σᵢₜ lᵢₜ / num_items             | dapo, cispo, vespo              |
    | seq-mean-token-mean     | 1/B Σᵢ (Σₜ lᵢₜ / |oᵢ|)          | grpo, sapo                      |
    | seq-mean-token-sum      | 1/B Σᵢ Σₜ lᵢₜ                   | luspo                           |
    | seq-mean-token-sum-norm | 1/B Σᵢ (Σₜ lᵢₜ / max_length)    | dr_grpo                         |

    A (B, 1) loss stands for every token of its row, as in TRL: token sums count it |oᵢ| times. Rows and batches in
    which nothing counts give 0.

    Under gradient accumulation, divide the result by the number of micro-batches. global-token-mean is the exception,
    because `num_items` already counts the tokens of all micro-batches (with several processes, their mean per process).

    Args:
        loss: (B, T) or (B, 1).
        mask: (B, T), true where the token counts.
        num_items: tokens of all micro-batches that share an optimizer step, per process.
        max_length: the longest completion that generation allows (`max_completion_length`).

    Raises:
        ValueError: `how` is unknown, or needs `num_items` or `max_length` and got None.
    """
    mask = mask.bool()
    # where, not a product: a hidden infinity times 0 is NaN.
    row_sums = torch.where(mask, loss, 0.0).sum(-1)  # (B,)
    rows = max(mask.shape[0], 1)
    if how == "token-mean":
        return row_sums.sum() / mask.sum().clamp(min=1)
    if how == "seq-mean-token-mean":
        return (row_sums / mask.sum(-1).clamp(min=1)).sum() / rows
    if how == "seq-mean-token-sum":
        return row_sums.sum() / rows
    if how == "global-token-mean":
        tokens = torch.as_tensor(_given(num_items, "num_items", how), device=row_sums.device)
        # No tokens anywhere make every row sum 0, and 0 / 0 would be NaN.
        return row_sums.sum() / tokens.clamp(min=1e-6)
    if how == "seq-mean-token-sum-norm":
        return row_sums.sum() / (rows * _given(max_length, "max_length", how))
    raise ValueError(f"Unknown loss reduction {how!r}.{suggestion(str(how), REDUCTIONS)}")


def average(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of a metric over the tokens that count, as TRL logs it. A metric per row is averaged over the rows."""
    if values.shape[1] == 1 and mask.shape[1] != 1:
        return values.mean() if len(values) else values.sum()
    return reduce(values, mask, "token-mean")


def _given(value: Tensor | float | None, name: str, how: str) -> Tensor | float:
    if value is None:
        raise ValueError(
            f"The reduction {how!r} divides by {name}, which is None. Pass {name}=..., or use 'token-mean'."
        )
    return value
