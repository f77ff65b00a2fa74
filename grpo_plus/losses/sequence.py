"""Losses that weigh a completion as a whole. One reward judges the whole completion, and so may one ratio.

GSPO itself is `grpo` with importance_sampling_level="sequence". `gspo_token` is GSPO for advantages that differ from
token to token. `gmpo` clips the tokens before it averages them. `kl_to_old` does not clip at all, and holds the policy
near the policy that generated.
"""

import math
from functools import partial

import torch

from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.losses.kl import KLEstimator, kl_divergence
from grpo_plus.losses.loss import register
from grpo_plus.losses.ratios import clip, clip_range, saturating_exp, sequence_ratio

_promising = partial(register, scope="row", reinforce_on_policy=True)


@_promising("gspo_token", reduction="seq-mean-token-mean", zero_without_advantage=True, reinforce_by_token=True)
def gspo_token(inputs: LossInputs, *, epsilon: float = 3e-4, epsilon_high: float | None = 4e-4) -> TokenLoss:
    """GSPO with a ratio per token: the sequence's value, the token's gradient.

        loss = −min(sₜ A, clip(sₜ, 1 − epsilon, 1 + epsilon_high) A),    sₜ = sg(s) · π(oₜ) / sg(π(oₜ))

    With one advantage per completion, value and gradient are GSPO's. With (B, T) advantages, each token answers for its
    own advantage.
    Zheng et al., "Group Sequence Policy Optimization" (https://huggingface.co/papers/2507.18071), Eq. 13-14;
    bounds from its section 5.1.
    """
    sequence = sequence_ratio(inputs).detach()
    ratio = sequence * (inputs.logps - inputs.logps.detach()).exp()
    return clip(ratio, inputs.advantages, clip_range(epsilon, epsilon_high))


@_promising("gmpo", reduction="seq-mean-token-mean", zero_without_advantage=True)
def gmpo(inputs: LossInputs, *, epsilon: float = 0.4, epsilon_high: float | None = None) -> TokenLoss:
    """Geometric mean of clipped token ratios, so that no single token carries a completion away.

        loss = −A exp(1/|o| Σₜ lₜ),    lₜ = min(log ρₜ, epsilon_high) where A > 0, max(log ρₜ, −epsilon) elsewhere

    The bounds are distances between log-probabilities. 0.4 lets a ratio go from 0.67 to 1.49, wider than PPO's clip,
    because the mean damps each token. With (B, T) advantages, each token takes its own advantage in both places.
    Zhao et al., "Geometric-Mean Policy Optimization" (https://huggingface.co/papers/2507.20673).
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    if not (epsilon >= 0 and epsilon_high >= 0):  # NaN is neither
        raise ValueError(
            f"epsilon={epsilon!r}, epsilon_high={epsilon_high!r} must not be negative; the paper uses 0.4."
        )
    rewarded = inputs.advantages > 0
    log_ratio = inputs.log_ratio
    clipped = torch.where(rewarded, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon))
    ratio = saturating_exp(clipped.sum(-1, keepdim=True) / inputs.lengths)
    below = (log_ratio < -epsilon) & (inputs.advantages < 0)
    above = (log_ratio > epsilon_high) & rewarded
    return TokenLoss(
        -ratio * inputs.advantages, {"clip_ratio/low_mean": below.float(), "clip_ratio/high_mean": above.float()}
    )


@_promising("kl_to_old", reduction="seq-mean-token-sum")
def kl_to_old(inputs: LossInputs, *, beta_old: float = 0.04, kl_estimator: KLEstimator = "k3") -> TokenLoss:
    """Ratio of the whole sequence, without a clip, plus a KL to the policy that generated the sequence.

        loss = −Σᵢ (∏ₜ ρᵢₜ) Aᵢ + beta_old Σᵢ Σₜ KL(π ‖ π_old)

    This is the objective of "A Comprehensive Analysis of GRPO", for advantages that are centered and not scaled
    (`dr_grpo`). The KL is a soft trust region: a step may leave it, at a price. It keeps its gradient where the
    advantage is 0. The product of many ratios varies wildly, so keep updates small and completions short.
    The article sums over the completions. The default reduction here takes the mean, loss/B, so that the learning rate
    does not depend on B. Each of the |o| tokens carries an equal share of the sequence's term.
    Estimator and weight of the KL: Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), Eq. 4 and
    section 4.2.

    Args:
        beta_old: weight of this KL. GRPOConfig's `beta` remains the weight of the KL to the reference model.
    """
    if not 0 <= beta_old < math.inf:
        raise ValueError(f"beta_old={beta_old!r} holds no policy near the old one. Use 0 or a positive number.")
    share = sequence_ratio(inputs, length_normalised=False) * inputs.advantages / inputs.lengths
    kl = kl_divergence(inputs.logps, inputs.old_logps, kl_estimator)
    # Without a weight the KL must go: 0 times an overflowed KL is NaN.
    return TokenLoss(beta_old * kl - share if beta_old else -share, {"kl_to_old": kl})
