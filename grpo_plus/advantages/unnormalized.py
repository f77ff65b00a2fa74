"""Estimators that subtract a baseline and do not divide: the reward's own scale reaches the gradient.

Take one when rewards of several tasks or magnitudes share a run and their size means something: a group whose rewards
are five times larger gets advantages five times larger. The learning rate then has to suit the rewards' scale.
"""

from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.reductions import centre, count


@register("dr_grpo", scope="group", shift_invariant=True, sums_to_zero=True)
def dr_grpo(rewards: Rewards) -> Tensor:
    """Centre on the group mean and do not scale, as TRL's scale_rewards="none".

    Aᵢ = rᵢ − mean(r)

    Dividing by the group's std weights prompts by how little their rewards vary; dropping it removes that bias.
    Liu et al., "Understanding R1-Zero-Like Training" (https://huggingface.co/papers/2503.20783), section 3.2.
    """
    return centre(rewards.total())


@register("rloo", scope="group", shift_invariant=True, sums_to_zero=True)
def rloo(rewards: Rewards) -> Tensor:
    """Centre on the mean of the *other* completions of the group: REINFORCE leave-one-out, LOOP's baseline.

    Aᵢ = rᵢ − mean(rⱼ, j ≠ i) = G/(G−1) · (rᵢ − mean(r))

    The baseline does not depend on the completion it judges, so the gradient is unbiased.
    Ahmadian et al., "Back to Basics" (https://huggingface.co/papers/2402.14740), section 3.3; the
    baseline of LOOP: Chen et al. (https://huggingface.co/papers/2502.01600).
    """
    total = rewards.total()
    others = (count(total) - 1).clamp(min=1)
    return centre(total) * count(total) / others
