"""Estimators that look at the reward functions one by one before they sum.

A sum forgets where it came from: (correct, malformed) and (wrong, well-formed) may add up to the same number. These
keep the difference, and keep a reward with a large spread from drowning one with a small spread.
"""

from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.reductions import zscore


@register("gdpo", shift_invariant=True, scale_invariant=True, sums_to_zero=True, multi_reward=True)
def gdpo(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Normalize each reward in its group, sum, normalize over the batch, as TRL's "normalize_then_sum".

    xᵢ = Σₖ wₖ (rᵢₖ − mean(rₖ)) / (std(rₖ) + eps)        over the group
    Aᵢ = (xᵢ − mean(x)) / (std(x) + eps)                 over the batch

    For several rewards of different scale or difficulty. Groups without spread count in the batch's std, so live
    groups grow beside dead ones.
    Liu et al., "GDPO" (https://huggingface.co/papers/2601.05242), Eq. 4-6.
    """
    per_function = zscore(rewards.values.transpose(1, 2), ddof=ddof, eps=eps).transpose(1, 2)
    summed = rewards.weighted_sum(per_function)
    return zscore(summed.flatten(), ddof=ddof, eps=eps).view_as(summed)
