"""Estimators that centre on the group and scale by a statistic of the whole batch.

One scale for all prompts keeps their relative sizes inside a batch, but a batch of other rewards gets another scale.
"""

from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.reductions import centre, divide, std


@register("batch_std", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def batch_std(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Centre on the group mean and divide by the std of all rewards, as TRL's scale_rewards="batch".

    Aᵢ = (rᵢ − mean(r_group)) / (std(r_batch) + eps)

    The std is that of the raw rewards, so differences between prompts count in it too.
    Liu et al., "Tricks or Traps? A Deep Dive into RL for LLM Reasoning" (https://huggingface.co/papers/2508.08221).
    """
    total = rewards.total()
    return divide(centre(total), std(total.flatten(), ddof=ddof), eps=eps)
