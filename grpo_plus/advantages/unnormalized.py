"""Estimators that subtract a baseline and do not divide: the scale of the rewards reaches the gradient.

`dr_grpo` subtracts the group's mean, `rloo` the mean of the other completions, `opo` a length-weighted mean.
Take such an estimator when a run mixes tasks or magnitudes of reward, and the size of a reward means something. Rewards
five times larger give advantages five times larger. The learning rate then has to suit the scale of the rewards.
"""

from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import center, center_on_others
from grpo_plus.advantages.rewards import Rewards


@register("dr_grpo", scope="group", shift_invariant=True, sums_to_zero=True)
def dr_grpo(rewards: Rewards) -> Tensor:
    """Center on the group mean and do not scale, as TRL's scale_rewards="none".

        Aᵢ = rᵢ − mean(r)

    A division by the group's std gives more weight to prompts whose rewards vary little. Here that bias is absent.
    Liu et al., "Understanding R1-Zero-Like Training" (https://huggingface.co/papers/2503.20783), section 3.2.
    """
    return center(rewards.total())


@register("rloo", scope="group", shift_invariant=True, sums_to_zero=True)
def rloo(rewards: Rewards) -> Tensor:
    """Center on the mean of the *other* completions of the group: REINFORCE leave-one-out, LOOP's baseline.

        Aᵢ = rᵢ − mean(rⱼ, j ≠ i) = G/(G−1) · (rᵢ − mean(r))

    The baseline does not depend on the completion that is judged, so the gradient is unbiased.
    Ahmadian et al., "Back to Basics" (https://huggingface.co/papers/2402.14740), section 3.3.
    LOOP has the same baseline: Chen et al. (https://huggingface.co/papers/2502.01600).
    """
    return center_on_others(rewards.total())


@register("opo", scope="group", shift_invariant=True, needs_lengths=True)
def opo(rewards: Rewards) -> Tensor:
    """Center on the group's length-weighted mean: a long completion counts more in the baseline.

        Aᵢ = rᵢ − Σⱼ lⱼ rⱼ / Σⱼ lⱼ        l: completion lengths in tokens

    This baseline has the least gradient variance if a completion's squared gradient norm grows with its length. The
    advantages of a group do not sum to zero, because long completions pull the baseline to their own reward.
    Hao et al., "On-Policy RL with Optimal Reward Baseline" (https://huggingface.co/papers/2505.23585).
    """
    return center(rewards.total(), rewards.tokens())
