"""Turn log-probabilities and advantages into one number to minimize. Pure functions: no trainer, model or processes.

To find a loss, run `grpo-plus ls losses`, or look in `LOSSES`. TRL's eight losses are stated here for comparison and
reading; TRL goes on computing them in training. The other losses are missing in TRL. Each file holds one family.

Where each batch of completions is used for one step only (old_logps = logps), nearly all losses have the gradient of
`reinforce` and differ in the reduction alone. A comparison of losses therefore needs `num_iterations` above 1, or
several optimizer steps per generation.

To add a loss, write one function in the file of its family, register the function with its promises (see `Loss`), and
add a hand-computed row to `tests/losses/cases.py`. The property tests then run by themselves.

A loss of your own leaves this package as it is:

    from grpo_plus.losses import LossInputs, TokenLoss, register

    @register("squared", reduction="token-mean")
    def squared(inputs: LossInputs, *, strength: float = 0.1) -> TokenLoss:
        penalty = strength / 2 * inputs.log_ratio.square()        # (B, T)
        return TokenLoss(penalty - inputs.advantages * inputs.logps)

A dotted path needs no registration: my_package.my_module.squared.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_plus.losses import (  # noqa: F401  (they register themselves)
    clipped,
    covariance,
    divergence,
    reweighted,
    sequence,
    smooth,
)
from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.losses.kl import KL_ESTIMATORS, AdaptiveBeta, KLEstimator, kl_to_reference
from grpo_plus.losses.loss import LOSSES, Loss, register
from grpo_plus.losses.ratios import ImportanceSamplingLevel
from grpo_plus.losses.reduce import REDUCTIONS, Reduction, average, reduce
from grpo_plus.registry import check_kinds

__all__ = [
    "KL_ESTIMATORS",
    "LOSSES",
    "REDUCTIONS",
    "TRL_LOSSES",
    "AdaptiveBeta",
    "Loss",
    "LossInputs",
    "PolicyLoss",
    "TokenLoss",
    "average",
    "check_loss_keywords",
    "policy_loss",
    "reduce",
    "register",
]

TRL_LOSSES = tuple(name for name in LOSSES.registered if LOSSES[name].origin == "trl")
"""Names of the losses that TRL computes itself."""


class PolicyLoss(NamedTuple):
    """A loss ready for `backward`, and what to log beside it.

    Attributes:
        loss: scalar.
        metrics: name -> (B, T) or (B, 1) without gradient. `average` over the mask turns each entry into one number.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    loss: Loss | str,
    inputs: LossInputs,
    keywords: Mapping[str, Any] | None = None,
    *,
    beta: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    kl_ratio: ImportanceSamplingLevel | None = "token",
    loss_reduction: Reduction | None = None,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
    accumulation_steps: int = 1,
) -> PolicyLoss:
    """Compute a loss in TRL's order: per token, times the sampler's ratio, plus beta times the KL, then reduced.

    Args:
        loss: an entry of `LOSSES`, its name, or a dotted path to a function.
        keywords: hyper-parameters of the loss. Absent ones keep the loss's defaults.
        beta: weight of the KL to the reference policy. 0 leaves the KL term out.
        kl_ratio: importance ratio that multiplies the KL estimate, see `kl_to_reference`.
        loss_reduction: a reduction in place of the loss's own.
        num_items: see `reduce`.
        max_length: see `reduce`.
        accumulation_steps: micro-batches that share an optimizer step. The loss is divided by this number, except under
            global-token-mean, where `num_items` already counts the tokens of all micro-batches.

    Raises:
        ValueError: a hyper-parameter is out of range, the loss or the reduction needs an input that is None, or the
            function did not return a `TokenLoss` of fitting shapes.
    """
    if isinstance(loss, str):
        loss = LOSSES[loss]
    result = loss.function(inputs, **(keywords or {}))
    _check_result(loss.name, result, inputs)
    per_token, metrics = result.loss, dict(result.metrics)
    if inputs.importance_sampling_ratio is not None and not loss.reads_sampling_ratio:
        per_token = per_token * inputs.importance_sampling_ratio
    if beta:
        metrics["kl"] = kl_to_reference(inputs, kl_estimator, kl_ratio)
        per_token = per_token + beta * metrics["kl"]
    reduction = loss_reduction or loss.reduction
    scalar = reduce(per_token, inputs.mask, reduction, num_items=num_items, max_length=max_length)
    if reduction != "global-token-mean":
        scalar = scalar / accumulation_steps
    return PolicyLoss(scalar, {name: values.detach() for name, values in metrics.items()})


def check_loss_keywords(loss: Loss, keywords: Mapping[str, Any]) -> None:
    """Refuse, with a ValueError, an unknown keyword, or a value that the loss refuses on a small made-up batch.

    A loss from outside this package is not run, because it may need inputs that the made-up batch lacks.
    """
    loss.check_taken(f"loss_kwargs={dict(keywords)}: the loss {loss.name!r}", keywords)
    try:
        check_kinds(loss.function, keywords)
        inspect.signature(loss.function).bind(None, **keywords)
        if loss.function.__module__.startswith("grpo_plus."):
            _try_on_a_small_batch(loss, keywords)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss_kwargs={dict(keywords)} does not fit {loss.name!r}: {error}") from error


def _try_on_a_small_batch(loss: Loss, keywords: Mapping[str, Any]) -> None:
    two = torch.tensor([[-1.0, -2.0], [-0.5, -1.0]])
    sample = LossInputs(two, two, torch.tensor([[1.0], [-1.0]]), torch.ones(2, 2), two)
    policy_loss(loss, sample, keywords, num_items=4.0, max_length=2)


def _check_result(name: str, result: Any, inputs: LossInputs) -> None:
    if not isinstance(result, TokenLoss):
        raise ValueError(f"The loss {name!r} returned {type(result).__name__}. Return TokenLoss(loss), unreduced.")
    rows, tokens = inputs.logps.shape
    for what, values in {"loss": result.loss, **result.metrics}.items():
        if tuple(values.shape) not in {(rows, tokens), (rows, 1)}:
            raise ValueError(
                f"The loss {name!r} returned {what!r} of shape {tuple(values.shape)} for log-probabilities of shape "
                f"{(rows, tokens)}; {(rows, tokens)} or {(rows, 1)} is needed. Masking and summing come afterwards."
            )
