"""Estimators that use a statistic of the whole batch.

All prompts of a batch share one scale, so that their relative sizes stay. Another batch gets another scale.
`batch_std` and `rloo_norm` center on the group. `gpg` makes up for groups that train nothing. `shrinkage` moves the
baseline of a group toward the mean of the other groups, and does not scale. REINFORCE++ whitens over the tokens of the
batch, with a group baseline (`reinforce_pp_baseline`) or without (`reinforce_pp`).
"""

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import check_choice, register
from grpo_plus.advantages.reductions import (
    center,
    center_on_others,
    count,
    divide,
    has_spread,
    mean,
    others,
    std,
    zscore,
)
from grpo_plus.advantages.rewards import Rewards


@register("batch_std", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def batch_std(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Center on the group mean and divide by the std of all rewards, as TRL's scale_rewards="batch".

        Aᵢ = (rᵢ − mean(r_group)) / (std(r_batch) + eps)

    The std is taken of the raw rewards, so differences between prompts enlarge it.
    Liu et al., "Tricks or Traps? A Deep Dive into RL for LLM Reasoning" (https://huggingface.co/papers/2508.08221).
    """
    total = rewards.total()
    return divide(center(total), std(total.flatten(), ddof=ddof), eps=eps)


@register("rloo_norm", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def rloo_norm(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Center on the mean of the other completions, then divide by the batch's std of that difference.

        xᵢ = rᵢ − mean(rⱼ, j ≠ i)                       over the group
        Aᵢ = (xᵢ − mean(x)) / (std(x) + eps)            over the batch, where mean(x) is 0 by construction

    Differences between prompts do not enter the std, unlike in `batch_std`. Groups without spread do enter: many of
    them shrink the std, and the advantages of the other groups grow.
    Ahmadian et al., "Back to Basics" (https://huggingface.co/papers/2402.14740), with the normalization of TRL's
    RLOOTrainer(normalize_advantages=True).
    """
    difference = center_on_others(rewards.total())
    return divide(difference, std(difference.flatten(), ddof=ddof), eps=eps)


@register("gpg", shift_invariant=True, sums_to_zero=True)
def gpg(rewards: Rewards) -> Tensor:
    """Center on the group mean and divide by the share of the batch that trains.

        Aᵢ = α (rᵢ − mean(r)),   α = B / B_live        B completions in the batch, B_live of them in groups with spread

    Groups without spread add nothing to the gradient and still count in its mean over the batch. α takes these groups
    out of the mean, so that the step size does not fade as more prompts are solved.
    Chu et al., "GPG" (https://huggingface.co/papers/2504.02546), with their F_norm = 1. (verl's gpg divides B by the
    number of rewards that are not 0, which is another number than B_live.)
    """
    total = rewards.total()
    judged = count(total)
    live = judged.where(has_spread(total), 0.0)
    return center(total) * (judged.sum() / live.sum().clamp(min=1))


@register("shrinkage", shift_invariant=True, trains_without_spread=True)
def shrinkage(rewards: Rewards) -> Tensor:
    """Center on the mean of the other completions, shrunk toward the mean of the other prompts: James-Stein.

        Aᵢⱼ = rᵢⱼ − (1 − λᵢ) mean(rᵢₗ, l ≠ j) − λᵢ m̄ᵢ        m̄ᵢ = mean(μₖ, k ≠ i),   μₖ the mean of group k
        λᵢ = (P−1)/P · vᵢ / (vᵢ + sᵢ)
        vᵢ = mean(var(rₖ) / G, k ≠ i)                        how far noise moves the mean of a group
        sᵢ = mean((μₖ − m̄ᵢ)², k ≠ i)                         how far the means of groups are apart

    The mean of a few completions is a noisy baseline. Where prompts are alike, the other prompts say more of what to
    expect, and λ is large. Where prompts differ, λ is near 0, and the estimator is `rloo`. There is nothing to tune.
    No part of the baseline sees the completion that it judges, so the gradient is unbiased. A group of equal rewards
    trains too: up if the other prompts do worse, down if they do better.
    Zeng et al., "Shrinking the Variance" (https://huggingface.co/papers/2511.03710), Eq. 10-16 of its first version.
    A single prompt has no others, and λ is 0.
    """
    total = rewards.total()
    judged, means = count(total), mean(total).squeeze(-1)
    noise = (std(total).square() / judged).where(judged > 1, torch.nan).squeeze(-1)
    from_noise = mean(others(noise))  # (P, 1), and so are the next two
    elsewhere = mean(others(means))
    apart = mean((others(means) - elsewhere).square())
    shrunk = (from_noise / (from_noise + apart)).nan_to_num() * (1 - 1 / count(means))
    return (1 - shrunk) * center_on_others(total) + shrunk * (total - elsewhere.nan_to_num())


@register("reinforce_pp", shift_invariant=True, scale_invariant=True, needs_lengths=True, trains_without_spread=True)
def reinforce_pp(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Whiten the rewards over all tokens of the batch, without a group baseline: REINFORCE++.

        Aᵢ = (rᵢ − m) / (s + eps)        m, s: mean and std over the batch, where rᵢ counts once per token of i

    One completion per prompt is enough. A group of equal rewards trains too: up if the batch is worse, down if the
    batch is better. With easy and hard prompts mixed, most of the advantage only says which prompt it was.
    Hu et al., "REINFORCE++" (https://huggingface.co/papers/2501.03262). The paper subtracts a KL penalty from the
    reward; TRL adds the KL to the loss (beta). Implementations differ: verl has ddof 1, OpenRLHF and NeMo RL ddof 0.
    """
    total, tokens = rewards.total(), rewards.tokens()
    return zscore(total.flatten(), ddof=ddof, eps=eps, weights=tokens.flatten()).view_as(total)


@register(
    "reinforce_pp_baseline",
    shift_invariant=True,
    scale_invariant=True,
    needs_lengths=True,
    trains_without_spread=True,
)
def reinforce_pp_baseline(rewards: Rewards, *, weight: str = "token", ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Center on the group mean, then whiten over the tokens of the batch: REINFORCE++-baseline.

        xᵢ = rᵢ − mean(r_group)
        Aᵢ = (xᵢ − m) / (s + eps)        m, s: mean and std over the batch, where xᵢ counts once per token of i

    The group mean takes out the difficulty of the prompt. The batch's std keeps one scale for all prompts. Where long
    completions have the better rewards, m is above 0, and groups of equal rewards (x = 0) get −m/s. With
    weight="sequence" m is 0, and these groups get 0.
    Hu et al., "REINFORCE++" (https://huggingface.co/papers/2501.03262).

    Args:
        weight: "token", or "sequence" to count every completion once (as ms-swift does, with eps = 1e-4).
    """
    check_choice("weight", weight, ("token", "sequence"))
    difference = center(rewards.total())
    if weight == "sequence":
        return divide(difference, std(difference.flatten(), ddof=ddof), eps=eps)
    return zscore(difference.flatten(), ddof=ddof, eps=eps, weights=rewards.tokens().flatten()).view_as(difference)
