"""Estimators that use a statistic of the whole batch.

All prompts of a batch share one scale, so that their relative sizes stay. Another batch gets another scale.
`batch_std` and `rloo_norm` center on the group. `gpg` makes up for groups that train nothing. REINFORCE++ whitens over
the tokens of the batch, with a group baseline (`reinforce_pp_baseline`) or without (`reinforce_pp`).
"""

from torch import Tensor

from grpo_plus.advantages.estimator import check_choice, register
from grpo_plus.advantages.reductions import center, center_on_others, count, divide, has_spread, std, zscore
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
