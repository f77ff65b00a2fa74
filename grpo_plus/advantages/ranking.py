"""Estimators built on the order of a group's rewards: ranks, medians, quantiles, the best one.

For rewards whose order can be trusted more than their size (`rank`), whose outliers should not move the baseline
(`median_mad`), whose easy and hard prompts should train on opposite ends (`quantile`), or when only the best of
several attempts will be used (`best_minus_second`).
"""

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import RESOLUTION, count, divide, has_spread, others, rounding, std
from grpo_plus.advantages.rewards import Rewards


@register("rank", scope="group", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def rank(rewards: Rewards) -> Tensor:
    """Ranks in the group, spread evenly from 2 for the best to −2 for the worst; ties share the average.

    Aᵢ = 2 − 4 (rankᵢ − 1)/(G − 1) = 2 (#{rⱼ < rᵢ} − #{rⱼ > rᵢ})/(G − 1)        rank 1 is the best

    For scores of a reward model, of which only the order means something. The authors break ties by position, which
    gives a group of equal rewards advantages from 2 to −2; here equal rewards get equal advantages, there 0.
    Choi et al., "GOPO: Policy Optimization using Ranked Rewards" (https://huggingface.co/papers/2602.03876).
    """
    total = rewards.total()
    mine, theirs = total.unsqueeze(-1), total.unsqueeze(-2)
    tied = (mine - theirs).abs() <= RESOLUTION * torch.maximum(mine.abs(), theirs.abs())
    wins = (mine - theirs).sign().where(~tied, 0.0).nansum(-1)
    return (2 * wins / (count(total) - 1).clamp(min=1)).where(~total.isnan(), torch.nan)


@register("median_mad", scope="group", shift_invariant=True, scale_invariant=True)
def median_mad(rewards: Rewards, *, eps: float = 1e-3) -> Tensor:
    """Centre on the group's median and divide by the median absolute deviation, or by the std where that is 0.

    Aᵢ = (rᵢ − median(r)) / (MAD(r) + eps)        MAD(r) = median(|r − median(r)|), lower medians

    The median hardly moves with one outlier, so in small groups fewer advantages get the wrong sign. The completion at
    the median gets 0. If more than half of the rewards are equal, as with binary ones, the MAD is 0 and the authors'
    code divides by eps alone (|A| = 1000); here such a group is divided by its sample std.
    Kim, "MC-GRPO" (https://huggingface.co/papers/2601.22582); the authors sample one completion more and leave the
    median one out of the backward pass.
    """
    total = rewards.total()
    deviations = total - total.nanmedian(-1, keepdim=True).values
    mad = deviations.abs().nanmedian(-1, keepdim=True).values
    scale = mad.where((mad > rounding(total)) & has_spread(total), std(total))
    return divide(deviations, scale, eps=eps)


@register("quantile", scope="group", shift_invariant=True, scale_invariant=True)
def quantile(rewards: Rewards, *, level: float = 0.4, eps: float = 1e-8) -> Tensor:
    """Centre on the group's K-quantile and divide by its population std.

    Aᵢ = (rᵢ − Q_K(r)) / (std(r) + eps)        Q_K = the smallest r with at least a share K of the group at or below it

    With binary rewards and success rate p: only successes train (A > 0) where p ≤ 1 − K, only failures (A < 0) above.
    Most completions get 0, which the authors find to keep the entropy from collapsing and from exploding.
    Wu et al., "Quantile Advantage Estimation" (https://huggingface.co/papers/2509.22611). We know the binary case with
    its std √(p(1 − p)) and eps from a reimplementation; for graded rewards the definition of the quantile is ours.

    Args:
        level: the paper's K, between 0 and 1. Prompts with a success rate up to 1 − K train on their successes.
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
    """Only the best completion trains, by its lead over the second best; a shared first place trains nothing.

    Aᵢ = (rᵢ − max(rⱼ, j ≠ i))₊ / (std(r) + eps)

    The leave-one-out gradient of the best of G: what one completion adds to the maximum. For a model whose best
    attempt counts, with a verifier to pick it.
    Tang et al., "Optimizing Language Models for Inference Time Objectives using Reinforcement Learning"
    (https://huggingface.co/papers/2503.19595); dividing by the std is verl's addition (its "grpo_passk").

    Args:
        scale: whether to divide by the group's sample std.
    """
    total = rewards.total()
    rival = others(total).nan_to_num(nan=-torch.inf).amax(-1)
    lead = (total - rival).where((total - rival > rounding(total)) & has_spread(total), 0.0)
    return divide(lead, std(total), eps=eps) if scale else lead
