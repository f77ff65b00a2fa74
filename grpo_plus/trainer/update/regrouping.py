"""Which rows meet in a micro-batch: TRL shuffles a prompt's completions apart, a shared prompt needs them together.

A row never leaves its optimizer step. The update stays what it was; only the order of a sum changes.
"""

from typing import Any

import torch

from grpo_plus.packing import regroup, reorder
from grpo_plus.trainer.names import trained_tokens
from grpo_plus.trainer.update.micro_batches import HostRows
from grpo_plus.trainer.update.pictures import joined_by_row, split_by_row

Inputs = dict[str, Any]


def regrouped(
    batches: list[Inputs], rows: HostRows, *, accumulation_steps: int, loss_type: str
) -> tuple[list[Inputs], HostRows]:
    """The micro-batches of a generation batch with prompts together, and their rows on the host.

    Args:
        batches: TRL's dictionaries, in the order in which they are trained on.
        rows: of all the dictionaries.
        accumulation_steps: micro-batches that share an optimizer step.
    """
    window = min(accumulation_steps, len(batches))
    if max(accumulation_steps, len(batches)) % window:
        return batches, rows
    prompts, tokens, size = rows.prompts, rows.tokens, len(rows.alive) // len(batches)
    moved, orders = [], []
    for start in range(0, len(batches), window):
        first, last = start * size, (start + window) * size
        order = regroup(prompts[first:last], tokens[first:last], window)
        some = _reordered([split_by_row(batch) for batch in batches[start : start + window]], order, loss_type)
        moved += [joined_by_row(batch) for batch in some]
        orders += [first + row for row in order]
    return moved, rows[torch.tensor(orders)]


def _reordered(batches: list[Inputs], order: list[int], loss_type: str) -> list[Inputs]:
    """The micro-batches of one optimizer step."""
    if loss_type != "bnpo":
        return reorder(batches, order)
    # bnpo divides by the tokens of the micro-batch: a row keeps the divisor of the one that it came from.
    batches = [_times(batch, 1 / trained_tokens(batch).sum().clamp(min=1.0)) for batch in batches]
    return [_times(batch, trained_tokens(batch).sum().clamp(min=1.0)) for batch in reorder(batches, order)]


def _times(inputs: Inputs, factor: torch.Tensor) -> Inputs:
    return inputs | {"advantages": inputs["advantages"] * factor}
