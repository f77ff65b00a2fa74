"""REINFORCE with a detached weight: every token keeps a gradient, and the ratio only decides how much.

    loss = −sg(w) A log π

A clip silences a token once its ratio has left the trust region. Here the weight is bounded instead. Take `cispo` where
rare but decisive tokens ("wait", "however") must not be clipped away. Take `vespo` or `topr` for completions that are
old or come from another policy, and `reinforce` where every batch is used once.
"""

import math
from functools import partial

import torch

from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.losses.loss import register
from grpo_plus.losses.ratios import (
    ImportanceSamplingLevel,
    clip_range,
    importance_ratio,
    sequence_ratio,
    token_ratio,
    weighted,
)

# The authors' bounds for log-ratios: w stays within 1e-8 and e^20.
LOWEST, HIGHEST = math.log(1e-8), 20.0

_promising = partial(
    register, scope="row", zero_without_advantage=True, reinforce_on_policy=True, reinforce_by_token=True
)


@_promising("reinforce", reduction="global-token-mean")
def reinforce(inputs: LossInputs) -> TokenLoss:
    """The policy gradient without a ratio: −A log π.

    Right for completions of the present policy, where every other loss comes down to this one. Biased as soon as a
    batch is used twice. The value of this loss means nothing; only the gradient does.
    Williams, "Simple statistical gradient-following algorithms" (1992). GPG is this loss with advantages of its own:
    Chu et al., "GPG" (https://huggingface.co/papers/2504.02546).
    """
    return weighted(inputs, torch.ones_like(inputs.logps))


@_promising("cispo", reduction="global-token-mean", origin="trl")
def cispo(
    inputs: LossInputs,
    *,
    epsilon_high: float = 5.0,
    importance_sampling_level: ImportanceSamplingLevel = "token",
) -> TokenLoss:
    """The ratio as a weight, clipped from above: −sg(min(ρ, epsilon_high)) A log π.

    Here `epsilon_high` is the bound itself, not a distance from 1. Beware of TRL's default: an unset epsilon_high
    becomes epsilon, 0.2, and every token is scaled by 0.2.
    MiniMax, "MiniMax-M1" (https://huggingface.co/papers/2506.13585), Eq. 4-5. The default here is that of
    Khatri et al., "ScaleRL" (https://huggingface.co/papers/2510.13786).
    """
    if not epsilon_high > 0:
        raise ValueError(
            f"epsilon_high={epsilon_high!r} would zero every token. Use a bound for the ratio, such as 5.0."
        )
    ratio = importance_ratio(inputs, importance_sampling_level)
    above = (ratio > epsilon_high) & (inputs.advantages > 0)
    return weighted(inputs, ratio.clamp(max=epsilon_high), {"cispo_clip_ratio": above.float()})


@_promising("cispo_two_sided", reduction="global-token-mean")
def cispo_two_sided(inputs: LossInputs, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> TokenLoss:
    """The ratio as a weight, clipped from both sides: −sg(clip(ρ, 1 − epsilon, 1 + epsilon_high)) A log π.

    verl and NeMo RL read CISPO this way. The lower bound keeps a gradient for tokens that became improbable. The bounds
    are distances from 1, as in `grpo`.
    MiniMax, "MiniMax-M1" (https://huggingface.co/papers/2506.13585), Eq. 4-5.
    """
    low, high = clip_range(epsilon, epsilon_high)
    ratio = token_ratio(inputs)
    metrics = {"clip_ratio/low_mean": (ratio < low).float(), "clip_ratio/high_mean": (ratio > high).float()}
    return weighted(inputs, ratio.clamp(low, high), metrics)


@_promising("topr", reduction="seq-mean-token-sum")
def topr(inputs: LossInputs, *, length_normalised: bool = False) -> TokenLoss:
    """Imitate good completions as they are, and taper off bad completions as the policy leaves them behind.

        loss = −sg(w) A log π,    w = 1 where A ≥ 0,    w = min(∏ₜ ρₜ, 1) elsewhere

    REINFORCE breaks off-policy because it pushes a bad completion down forever. Here the weight of a bad completion
    goes to 0 as its probability does. Needs no KL term, and works on completions of any other policy.
    Le Roux et al., "Tapered Off-Policy REINFORCE" (https://huggingface.co/papers/2503.14286).

    Args:
        length_normalised: take the geometric mean of the token ratios in place of their product. The paper has the
            product, which is close to 0 or above 1 for most long completions.
    """
    ratio = sequence_ratio(inputs, length_normalised=length_normalised)
    weight = torch.where(inputs.advantages >= 0, 1.0, ratio.clamp(max=1.0))
    return weighted(inputs, weight, {"topr/weight_mean": weight})


@_promising("vespo", reduction="global-token-mean", origin="trl", reads_sampling_ratio=True)
def vespo(
    inputs: LossInputs,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> TokenLoss:
    """Weight a sequence by a smooth bump over its ratio.

        loss = −sg(φ(w)) A log π,    φ(w) = wᵏ e^(λ (1 − w)),    w = ∏ₜ ρₜ

    φ(1) = 1. k says how fast a sequence fades that became improbable, and λ how fast a sequence fades that became
    probable. The sampler's ratio, where there is one, is a factor of w.
    "VESPO: Variational Sequence-Level Soft Policy Optimization" (https://huggingface.co/papers/2602.10693).
    """
    log_w = inputs.log_ratio.clamp(-HIGHEST, HIGHEST).sum(-1, keepdim=True)
    if inputs.importance_sampling_ratio is not None:
        log_w = log_w + inputs.importance_sampling_ratio.log().clamp(LOWEST, HIGHEST).sum(-1, keepdim=True)
    log_w = log_w.clamp(LOWEST, HIGHEST)
    rewarded = inputs.advantages >= 0
    k = torch.where(rewarded, vespo_k_pos, vespo_k_neg)
    # As TRL: without any decay, φ would grow without bound.
    decay = torch.where(rewarded, vespo_lambda_pos, vespo_lambda_neg).clamp(min=1e-4)
    phi = (decay + k * log_w - decay * log_w.exp()).exp()
    return weighted(inputs, phi, {"vespo/phi_seq_mean": phi})
