"""Losses that fade a token out as its ratio leaves 1, instead of cutting the token off.

A clip is all or nothing: the gradient is whole at ρ = 1.19 and gone at 1.21. A gate keeps a little of the gradient, so
that tokens that drifted far can still come back.
"""

import torch

from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.losses.loss import register
from grpo_plus.losses.ratios import ImportanceSamplingLevel, importance_ratio


@register(
    "sapo",
    reduction="seq-mean-token-mean",
    origin="trl",
    scope="row",
    zero_without_advantage=True,
    reinforce_on_policy=True,
    reinforce_by_token=True,
)
def sapo(
    inputs: LossInputs,
    *,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    importance_sampling_level: ImportanceSamplingLevel = "token",
) -> TokenLoss:
    """A sigmoid of the ratio, steeper for tokens with a negative advantage.

        loss = −(4/τ) σ(τ (ρ − 1)) A,    τ = sapo_temperature_pos where A > 0, sapo_temperature_neg elsewhere

    The weight of the gradient, 4 σ'(τ (ρ − 1)) ρ, is 1 at ρ = 1 and falls smoothly on both sides. Pushing a token down
    spreads its probability over the whole vocabulary. That is noisier than pushing a token up, hence the steeper gate.
    Gao et al., "Soft Adaptive Policy Optimization" (https://huggingface.co/papers/2511.20347).
    """
    for name, value in (
        ("sapo_temperature_pos", sapo_temperature_pos),
        ("sapo_temperature_neg", sapo_temperature_neg),
    ):
        if not value > 0:
            raise ValueError(f"{name}={value!r}: the gate needs a positive temperature. The paper uses 1.0 and 1.05.")
    advantages = inputs.advantages
    temperature = torch.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    ratio = importance_ratio(inputs, importance_sampling_level)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return TokenLoss(-gate * advantages)
