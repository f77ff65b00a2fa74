"""Estimators that use a statistic of the whole batch.

One scale for all prompts keeps their relative sizes inside a batch, but a batch of other rewards gets another scale.
`batch_std` and `rloo_norm` centre on the group, `gpg` makes up for groups that train nothing, and REINFORCE++ whitens
over the tokens of the batch, with or without a group baseline.
"""

from torch import Tensor

from grpo_plus.advantages.estimator import check_choice, register
from grpo_plus.advantages.reductions import centre, centre_on_others, count, divide, has_spread, std, zscore
from grpo_plus.advantages.rewards import Rewards


@register("batch_std", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def batch_std(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Centre on the group mean and divide by the std of all rewards, as TRL's scale_rewards="batch".

    Aᵢ = (rᵢ − mean(r_group)) / (std(r_batch) + eps)

    The std is that of the raw rewards, so differences between prompts count in it too.
    Liu et al., "Tricks or Traps? A Deep Dive into RL for LLM Reasoning" (https://huggingface.co/papers/2508.08221).
    """
    total = rewards.total()
    return divide(centre(total), std(total.flatten(), ddof=ddof), eps=eps)


@register("rloo_norm", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def rloo_norm(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Centre on the mean of the other completions, then divide by the batch's std of that difference.

    xᵢ = rᵢ − mean(rⱼ, j ≠ i)                       over the group
    Aᵢ = (xᵢ − mean(x)) / (std(x) + eps)            over the batch, where mean(x) is 0 by construction

    Unlike in `batch_std`, differences between prompts do not count in the std. Groups without spread do: beside many
    of them the others grow.
    Ahmadian et al., "Back to Basics" (https://huggingface.co/papers/2402.14740), with the normalization of TRL's
    RLOOTrainer(normalize_advantages=True).
    """
    difference = centre_on_others(rewards.total())
    return divide(difference, std(difference.flatten(), ddof=ddof), eps=eps)


@register("gpg", shift_invariant=True, sums_to_zero=True)
def gpg(rewards: Rewards) -> Tensor:
    """Centre on the group mean and multiply by the share of the batch that trains, inverted.

    Aᵢ = α (rᵢ − mean(r)),   α = B / (B − M)        B completions in the batch, M of them in groups without spread

    Groups without spread add nothing to the gradient but count in its mean; α takes them out of it, so the step size
    does not fade as more prompts are solved.
    Chu et al., "GPG" (https://huggingface.co/papers/2504.02546), with their F_norm = 1. (verl's gpg counts the rewards
    that are not 0 instead of M, which is another number.)
    """
    total = rewards.total()
    judged = count(total)
    live = judged.where(has_spread(total), 0.0)
    return centre(total) * (judged.sum() / live.sum().clamp(min=1))


@register("reinforce_pp", shift_invariant=True, scale_invariant=True, needs_lengths=True, trains_without_spread=True)
def reinforce_pp(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Whiten the rewards over all tokens of the batch, without a group baseline: REINFORCE++.

    Aᵢ = (rᵢ − m) / (s + eps)        m, s: mean and std over the batch, where rᵢ counts once per token of i

    Works with one completion per prompt. A group of equal rewards trains too: up if the batch is worse, down if it is
    better. With easy and hard prompts mixed, most of the advantage says which prompt it was.
    Hu et al., "REINFORCE++" (https://huggingface.co/papers/2501.03262). The paper subtracts a KL penalty from the
    reward; TRL has it in the loss (beta). Implementations differ: verl ddof 1, OpenRLHF and NeMo RL ddof 0.
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
    """Centre on the group mean, then whiten over the tokens of the batch: REINFORCE++-baseline.

    xᵢ = rᵢ − mean(r_group)
    Aᵢ = (xᵢ − m) / (s + eps)        m, s: mean and std over the batch, where xᵢ counts once per token of i

    The group mean takes the prompt's difficulty out, the batch's std keeps one scale for all prompts. If long
    completions are the better ones m is above 0, and groups of equal rewards (x = 0) get −m/s. With weight="sequence"
    m is 0, and so are they.
    Hu et al., "REINFORCE++" (https://huggingface.co/papers/2501.03262).

    Args:
        weight: "token", or "sequence" if every completion counts once (ms-swift, there with eps = 1e-4).
    """
    check_choice("weight", weight, ("token", "sequence"))
    difference = centre(rewards.total())
    if weight == "sequence":
        return divide(difference, std(difference.flatten(), ddof=ddof), eps=eps)
    return zscore(difference.flatten(), ddof=ddof, eps=eps, weights=rewards.tokens().flatten()).view_as(difference)
