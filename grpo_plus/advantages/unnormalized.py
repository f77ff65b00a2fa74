"""Estimators that subtract a baseline and do not divide: the reward's own scale reaches the gradient.

`dr_grpo` subtracts the group's mean, `rloo` the mean of the others, `opo` a length-weighted mean.
Take one when rewards of several tasks or magnitudes share a run and their size means something: a group whose rewards
are five times larger gets advantages five times larger. The learning rate then has to suit the rewards' scale.
"""

from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import centre, centre_on_others
from grpo_plus.advantages.rewards import Rewards


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
    return centre_on_others(rewards.total())


@register("opo", scope="group", shift_invariant=True, needs_lengths=True)
def opo(rewards: Rewards) -> Tensor:
    """Centre on the group's length-weighted mean, where a long completion counts more in the baseline.

    Aᵢ = rᵢ − Σⱼ lⱼ rⱼ / Σⱼ lⱼ        l: completion lengths in tokens

    The baseline of least gradient variance, if a completion's squared gradient norm grows with its length. The
    advantages of a group then do not sum to zero: long completions pull the baseline to their own reward.
    Hao et al., "On-Policy RL with Optimal Reward Baseline" (https://huggingface.co/papers/2505.23585).
    """
    return centre(rewards.total(), rewards.tokens())
