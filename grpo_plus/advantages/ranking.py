"""Estimators built on the order of a group's rewards: ranks, medians, quantiles, the best completion.

Take `rank` where the order of the rewards is more reliable than their size, and `median_mad` where outliers should not
move the baseline. `quantile` trains hard prompts on their successes and easy prompts on their failures.
`best_minus_second` fits a model of which only the best of several attempts is used.
"""

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import RESOLUTION, count, divide, has_spread, others, rounding, std
from grpo_plus.advantages.rewards import Rewards


@register("rank", scope="group", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def rank(rewards: Rewards) -> Tensor:
    """Spread the group's ranks evenly from 2 for the best to −2 for the worst; ties share the average.

        Aᵢ = 2 − 4 (rankᵢ − 1)/(G − 1) = 2 (#{rⱼ < rᵢ} − #{rⱼ > rᵢ})/(G − 1)        rank 1 is the best

    For the scores of a reward model, where only the order means something. The authors break ties by position, so that
    a group of equal rewards has advantages from 2 to −2. Here equal rewards get equal advantages, in such a group 0.
    Choi et al., "GOPO: Policy Optimization using Ranked Rewards" (https://huggingface.co/papers/2602.03876).
    """
    total = rewards.total()
    mine, theirs = total.unsqueeze(-1), total.unsqueeze(-2)
    tied = (mine - theirs).abs() <= RESOLUTION * torch.maximum(mine.abs(), theirs.abs())
    wins = (mine - theirs).sign().where(~tied, 0.0).nansum(-1)
    return (2 * wins / (count(total) - 1).clamp(min=1)).where(~total.isnan(), torch.nan)


@register("median_mad", scope="group", shift_invariant=True, scale_invariant=True)
def median_mad(rewards: Rewards, *, eps: float = 1e-3) -> Tensor:
    """Center on the group's median and divide by the median absolute deviation, or by the std where that is 0.

        Aᵢ = (rᵢ − median(r)) / (MAD(r) + eps)        MAD(r) = median(|r − median(r)|), lower medians

    One outlier hardly moves the median, so in small groups fewer advantages get the wrong sign. The completion at the
    median gets 0. The MAD is 0 if more than half of the rewards are equal, as binary rewards often are. The authors'
    code then divides by eps alone (|A| = 1000). Here such a group is divided by its sample std.
    Kim, "MC-GRPO" (https://huggingface.co/papers/2601.22582). The authors sample one completion more and leave the
    median completion out of the backward pass.
    """
    total = rewards.total()
    deviations = total - total.nanmedian(-1, keepdim=True).values
    mad = deviations.abs().nanmedian(-1, keepdim=True).values
    scale = mad.where((mad > rounding(total)) & has_spread(total), std(total))
    return divide(deviations, scale, eps=eps)


@register("quantile", scope="group", shift_invariant=True, scale_invariant=True)
def quantile(rewards: Rewards, *, level: float = 0.4, eps: float = 1e-8) -> Tensor:
    """Center on a quantile of the group's rewards and divide by their population std.

        Aᵢ = (rᵢ − Q(r)) / (std(r) + eps)    Q: the smallest r with at least a share level of the group at or below it

    With binary rewards and success rate p, only successes train (A > 0) where p ≤ 1 − level, and only failures (A < 0)
    above. Most completions get 0. The authors find that this keeps the entropy from collapsing and from exploding.
    Wu et al., "Quantile Advantage Estimation" (https://huggingface.co/papers/2509.22611). We know the binary case, its
    std √(p(1 − p)) and its eps from a reimplementation. For graded rewards the definition of the quantile is ours.

    Args:
        level: between 0 and 1. Prompts with a success rate up to 1 − level train on their successes.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} is not a quantile. Use a number between 0 and 1, such as 0.4.")
    total = rewards.total()
    # 0.28 * 25 is 7.000000000000001: without the margin the eighth of 25 would be the 0.28-quantile.
    place = (level * count(total) - 1e-9).ceil().clamp(min=1).long() - 1
    baseline = total.sort(dim=-1).values.gather(-1, place)  # NaN sorts last
    return divide(total - baseline, std(total, ddof=0), eps=eps)


@register("best_minus_second", scope="group", shift_invariant=True, scale_invariant=True)
def best_minus_second(rewards: Rewards, *, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Train the best completion only, by its lead over the second best; a shared first place trains nothing.

        Aᵢ = (rᵢ − max(rⱼ, j ≠ i))₊ / (std(r) + eps)

    This is the leave-one-out gradient of the best of G: what one completion adds to the maximum. For a model whose best
    attempt counts, with a verifier to pick that attempt.
    Tang et al., "Optimizing Language Models for Inference Time Objectives using Reinforcement Learning"
    (https://huggingface.co/papers/2503.19595). The division by the std is verl's addition (its "grpo_passk").

    Args:
        scale: whether to divide by the group's sample std.
    """
    total = rewards.total()
    rival = others(total).nan_to_num(nan=-torch.inf).amax(-1)
    lead = (total - rival).where((total - rival > rounding(total)) & has_spread(total), 0.0)
    return divide(lead, std(total), eps=eps) if scale else lead
