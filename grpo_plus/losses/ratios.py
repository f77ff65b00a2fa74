"""Importance ratios between the policy and the policy that generated, and PPO's clip of a ratio.

A ratio per token has little variance, but ignores that earlier tokens drifted too. The theory asks for a ratio per
sequence, but that ratio is a product of hundreds of token ratios. GSPO lies between, with the sequence's log-ratio
divided by the length.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.registry import suggestion

ImportanceSamplingLevel = Literal["token", "sequence"]
LEVELS: tuple[ImportanceSamplingLevel, ...] = get_args(ImportanceSamplingLevel)


def token_ratio(inputs: LossInputs) -> Tensor:
    """Ratio of each token's probabilities: ρₜ = π(oₜ) / π_old(oₜ), (B, T)."""
    return saturating_exp(inputs.log_ratio)


def sequence_ratio(inputs: LossInputs, *, length_normalised: bool = True) -> Tensor:
    """Ratio of the probabilities of whole sequences, (B, 1).

        s = (∏ₜ ρₜ)^(1/|o|),  or  ∏ₜ ρₜ  without the normalization

    The geometric mean of the token ratios is TRL's "sequence" level.
    Zheng et al., "Group Sequence Policy Optimization" (https://huggingface.co/papers/2507.18071), Eq. 7.
    """
    log_ratio = inputs.log_ratio.sum(-1, keepdim=True)
    return saturating_exp(log_ratio / inputs.lengths if length_normalised else log_ratio)


def importance_ratio(inputs: LossInputs, level: ImportanceSamplingLevel) -> Tensor:
    """`token_ratio` or the length-normalized `sequence_ratio`, by TRL's name: (B, T) or (B, 1)."""
    if level not in LEVELS:
        raise ValueError(f"Unknown importance_sampling_level {level!r}.{suggestion(str(level), LEVELS)}")
    return token_ratio(inputs) if level == "token" else sequence_ratio(inputs)


def saturating_exp(log_ratio: Tensor) -> Tensor:
    """exp that stops at the dtype's largest number instead of infinity."""
    # A clip gives an overflowed ratio a gradient of 0, and 0 * inf is NaN. The margin is for rounding in the dtype.
    limits = torch.finfo(log_ratio.dtype)
    return log_ratio.clamp(max=math.log(limits.max) * (1 - limits.eps)).exp()


def weighted(inputs: LossInputs, weight: Tensor, metrics: dict[str, Tensor] | None = None) -> TokenLoss:
    """REINFORCE with a detached weight, −sg(w) A log π. Only the gradient of this loss means anything."""
    return TokenLoss(-weight.detach() * inputs.advantages * inputs.logps, metrics or {})


def clip_range(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """Bounds of a clip, (1 − epsilon, 1 + epsilon_high). None for `epsilon_high` means the same as `epsilon`."""
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    if not (epsilon >= 0 and epsilon_high >= 0):  # NaN is neither
        raise ValueError(
            f"epsilon={epsilon!r}, epsilon_high={epsilon_high!r}: a ratio cannot be clipped to less than "
            "nothing. Use small numbers such as 0.2 and 0.28."
        )
    return 1 - epsilon, 1 + epsilon_high


def clip(ratio: Tensor, advantages: Tensor, bounds: tuple[float, float], *, delta: float | None = None) -> TokenLoss:
    """PPO's clipped surrogate: the more pessimistic of the ratio and the clipped ratio.

        loss = −min(ρ A, clip(ρ, low, high) A)

    A token that has already moved far enough in the direction of its advantage gets no gradient. A token that moved the
    other way keeps its whole gradient. For a negative advantage the gradient has no limit, unless `delta` sets one.
    Schulman et al., "Proximal Policy Optimization" (https://huggingface.co/papers/1707.06347), Eq. 7.
    """
    low, high = bounds
    clipped = ratio.clamp(low, high)
    ratio = ratio if delta is None else ratio.clamp(max=delta)
    below = (ratio < low) & (advantages < 0)
    above = (ratio > high) & (advantages > 0)
    return TokenLoss(
        -torch.min(ratio * advantages, clipped * advantages),
        {
            "clip_ratio/low_mean": below.float(),
            "clip_ratio/high_mean": above.float(),
            "clip_ratio/region_mean": (below | above).float(),
        },
    )
