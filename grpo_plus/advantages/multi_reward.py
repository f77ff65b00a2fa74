"""Estimators that look at each reward function by itself before they sum.

A sum forgets its parts: (correct, malformed) and (wrong, well-formed) may add up to the same number. `gdpo`, `mo_grpo`,
`sa_mrpo` and `gd2po` keep the difference. They also keep a reward with a large spread from drowning a reward with a
small spread. `gd2po` leaves out the completions on which the rewards disagree. `dvao` only rescales the sum, by the
spreads of its parts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import check_choice, register
from grpo_plus.advantages.reductions import RESOLUTION, center, count, divide, has_spread, mean, std, zscore
from grpo_plus.advantages.rewards import Rewards


@register(
    "gdpo", shift_invariant=True, scale_invariant=True, sums_to_zero=True, multi_reward=True, normalizes_each=True
)
def gdpo(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4, batch_over: str = "all") -> Tensor:
    """Normalize each reward in its group, sum, normalize over the batch, as TRL's "normalize_then_sum".

        xᵢ = Σₖ wₖ (rᵢₖ − mean(rₖ)) / (std(rₖ) + eps)        over the group
        Aᵢ = (xᵢ − mean(x)) / (std(x) + eps)                 over the batch, where mean(x) is 0 by construction

    For several rewards of different scale or difficulty.
    Liu et al., "GDPO" (https://huggingface.co/papers/2601.05242), Eq. 4-6.

    Args:
        batch_over: which x enter the batch's std. "all", as in the paper and in TRL, includes dead groups (every x is
            0). Their zeros shrink the std, and live groups grow by √((B−1)/(B_live−1)): 3.2 for one live group of
            four beside seven dead groups. "live" leaves dead groups out.
    """
    return _over_batch(_normalize_then_sum(rewards, ddof=ddof, eps=eps), ddof=ddof, eps=eps, batch_over=batch_over)


@register(
    "mo_grpo",
    scope="group",
    shift_invariant=True,
    scale_invariant=True,
    sums_to_zero=True,
    multi_reward=True,
    normalizes_each=True,
)
def mo_grpo(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Normalize each reward in its group and sum: `gdpo` without its batch step.

        Aᵢ = Σₖ wₖ (rᵢₖ − mean(rₖ)) / (std(rₖ) + eps)        over the group

    Every reward function has the same say whatever its scale, and no prompt depends on another. The advantages grow
    with the number of reward functions, so the weights should sum to about 1. A reward without spread adds 0.
    Ichihara et al., "MO-GRPO" (https://huggingface.co/papers/2509.22047), whose weights are 1. We know the formula
    from reviews. They leave open the kind of std and eps, so the defaults are TRL's.
    """
    return _normalize_then_sum(rewards, ddof=ddof, eps=eps)


@register("dvao", scope="group", shift_invariant=True, scale_invariant=True, sums_to_zero=True, multi_reward=True)
def dvao(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Weight each reward's z-score by that reward's share of the spread in the group.

        Aᵢ = Σₖ w̃ₖ (rᵢₖ − mean(rₖ)) / std(rₖ),   w̃ₖ = wₖ std(rₖ) / Σₗ wₗ std(rₗ)
           = Σₖ wₖ (rᵢₖ − mean(rₖ)) / (Σₗ |wₗ| std(rₗ) + eps)

    This is the z-score of the weighted sum, with a larger divisor where the rewards disagree. It is never larger than
    `grpo`'s, and shrinks as the parts cancel. Sums that `grpo` cannot tell apart stay alike.
    Jiang et al., "DVAO" (https://huggingface.co/papers/2605.25604), known to us from a review. The review leaves open
    the kind of std, eps, and groups without spread. Here std and eps are TRL's, and such groups get 0. |w| makes a
    penalty, a reward of negative weight, count by its size.
    """
    by_function = rewards.values.transpose(1, 2)
    spread = std(by_function, ddof=ddof).squeeze(-1) * rewards.weights.abs()
    return divide(rewards.weighted_sum(center(by_function).transpose(1, 2)), spread.sum(-1, keepdim=True), eps=eps)


@register("sa_mrpo", sums_to_zero=True, multi_reward=True, normalizes_each=True)
def sa_mrpo(
    rewards: Rewards,
    *,
    gamma: float = 0.5,
    bounds: Mapping[str, Sequence[float]] | None = None,
    ddof: int = 1,
    eps: float = 1e-4,
    batch_over: str = "all",
) -> Tensor:
    """`gdpo` with less weight on rewards that the batch has almost maxed out.

        w̃ₖ = wₖ (1 − sₖ)^gamma,   sₖ = (mean_batch(rₖ) − lowₖ) / (highₖ − lowₖ)        then `gdpo` with the weights w̃

    A format reward that is nearly always earned stops outvoting correctness. gamma = 0 is exactly `gdpo`.
    A mean outside the bounds counts as the nearer bound.
    Wang et al., "Learn What's Left, Not What's Mastered" (https://huggingface.co/papers/2608.16072), known to us from
    reviews. They leave the std open, so it is TRL's, as in `gdpo`.

    Args:
        gamma: 0 or more. A larger gamma moves the weight faster.
        bounds: reward name -> [low, high], the range of that reward. Rewards without an entry range from 0 to 1.
        batch_over: as in `gdpo`.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma!r} is negative. Use 0 or more; 0.5 is the paper's choice.")
    low, high = _bounds(rewards, bounds or {})
    average = mean(rewards.values.flatten(0, 1).T).squeeze(-1)
    saturation = ((average - low) / (high - low)).clamp(0, 1)
    weighted = replace(rewards, weights=rewards.weights * (1 - saturation) ** gamma)
    return _over_batch(_normalize_then_sum(weighted, ddof=ddof, eps=eps), ddof=ddof, eps=eps, batch_over=batch_over)


@register("gd2po", shift_invariant=True, scale_invariant=True, multi_reward=True, normalizes_each=True)
def gd2po(rewards: Rewards, *, tau: float = 0.8, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """`gdpo` without the completions whose rewards disagree, and with less weight on prompts that have many of them.

        zᵢₖ = wₖ (rᵢₖ − mean(rₖ)) / (std(rₖ) + eps)          over the group
        keptᵢ = |Σₖ zᵢₖ| ≥ tau Σₖ |zᵢₖ|
        xᵢ = share of the group that is kept · Σₖ zᵢₖ
        Aᵢ = (xᵢ − mean(x)) / (std(x) + eps)                 over the kept of the batch; 0 for the others

    A completion that is better in one reward and worse in another has a sum near 0 that says little. Left out, such
    completions no longer shrink the std, and the clear ones count for more. With one reward nothing disagrees, and the
    estimator is `gdpo`.
    Liu et al., "GD²PO" (https://huggingface.co/papers/2606.16771); we read the abstract and the authors' code. The code
    whitens over tokens, and completions count once here, as in `gdpo`. There a group of equal rewards gets −mean(x),
    and 0 here.

    Args:
        tau: from 0, which keeps all, to 1, which keeps only completions whose rewards all agree (GD²PO-Hard).
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau!r} is no share of agreement. Use a number from 0 to 1; 0.8 is the authors' choice.")
    scores = zscore(rewards.values.transpose(1, 2), ddof=ddof, eps=eps).transpose(1, 2)
    summed, sizes = rewards.weighted_sum(scores), (scores * rewards.weights).abs().nansum(-1)
    kept = summed.abs() >= (tau - RESOLUTION) * sizes  # False where nothing was judged
    weighted = summed * kept.sum(-1, keepdim=True) / count(summed).clamp(min=1)
    advantages = zscore(weighted.where(kept, torch.nan).flatten(), ddof=ddof, eps=eps).view_as(summed)
    live = sizes.any(-1, keepdim=True)
    return advantages.where(kept & live, 0.0)


def _normalize_then_sum(rewards: Rewards, *, ddof: int, eps: float) -> Tensor:
    """(P, G) weighted sum of each reward's z-score in its group."""
    return rewards.weighted_sum(zscore(rewards.values.transpose(1, 2), ddof=ddof, eps=eps).transpose(1, 2))


def _over_batch(summed: Tensor, *, ddof: int, eps: float, batch_over: str) -> Tensor:
    """Divide by the std over the batch, or over its groups that have any spread."""
    check_choice("batch_over", batch_over, ("all", "live"))
    counted = summed if batch_over == "all" else summed.where(has_spread(summed), torch.nan)
    return divide(summed, std(counted.flatten(), ddof=ddof), eps=eps)


def _bounds(rewards: Rewards, bounds: Mapping[str, Sequence[float]]) -> tuple[Tensor, Tensor]:
    """(K,) least and greatest value of each reward."""
    table = torch.tensor([[0.0, 1.0]] * len(rewards.names), dtype=torch.float64)
    if not isinstance(bounds, Mapping):
        raise ValueError(f"bounds={bounds!r} is no table of rewards. Write {{name: [low, high]}}.")
    for name, pair in bounds.items():
        column = rewards.index(name)
        if len(pair) != 2 or not -math.inf < pair[0] < pair[1] < math.inf:
            raise ValueError(f"bounds[{name!r}]={pair!r} bounds nothing. Write [low, high] with low < high.")
        table[column] = torch.tensor(pair, dtype=torch.float64)
    return table[:, 0], table[:, 1]
