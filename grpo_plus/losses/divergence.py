"""DPPO: a trust region in probabilities, where PPO's clip has one in ratios.

    loss = −sg(M min(r, c)) A log π,    r = π / μ

    M = 0 where A > 0, r > 1 and D > delta_high
    M = 0 where A < 0, r < 1 and D > delta
    M = 1 elsewhere

A ratio says little about how far a policy has moved. A token that goes from 0.0001 to 0.01 has a ratio of 100 and moves
hardly any probability: PPO's clip stops such a token. A token that falls from 0.99 to 0.80 has a ratio of 0.81 and
moves a fifth of it: PPO's clip lets such a token go on. Here D measures what the token's probability has moved. A token
that moves back keeps its gradient.

μ is what sampled the token, for the ratio and for D: the sampler's own probabilities under vLLM or a rollout function,
and else the old policy's. The authors' trainings collapsed with a trust region around the policy's own recomputed
probabilities. So `importance_sampling_ratio` does not multiply these losses: r contains what that ratio corrects.

D is binary: the token against the rest of the vocabulary. The authors' other form compares the most probable tokens
too, which needs more than a loss sees here. They found no difference between the two.
Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning" (https://huggingface.co/papers/2602.04879),
Eq. 11-14; thresholds from its appendix C.1, c from the authors' code.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.losses.loss import register
from grpo_plus.losses.ratios import saturating_exp, weighted

_promising = partial(
    register,
    reduction="global-token-mean",
    scope="row",
    zero_without_advantage=True,
    reinforce_on_policy=True,
    reinforce_by_token=True,
    reads_sampling_ratio=True,
)


@_promising("dppo_tv")
def dppo_tv(inputs: LossInputs, *, delta: float = 0.15, delta_high: float | None = None, c: float = 20.0) -> TokenLoss:
    """Stop a token whose probability has moved by more than delta in the direction of its advantage.

        loss = −sg(M min(r, c)) A log π,    r = π / μ,    D = |π − μ|

        M = 0 where D > delta and r has left 1 in the direction of A; 1 elsewhere

    The same distance for rare and for probable tokens, unlike PPO's clip. μ is what sampled: vLLM or a rollout
    function, and else the old policy.
    Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning" (https://huggingface.co/papers/2602.04879),
    Eq. 11-13.

    Args:
        delta: largest distance, from 0 to 1, of a token with a negative advantage.
        delta_high: largest distance of a token with a positive advantage. None means the same as `delta`.
        c: bound for the ratio, above 1. The paper has none (math.inf), the authors' code and TRL's trainer have 20.
    """
    return _within(inputs, _binary_tv, delta, delta_high, c)


@_promising("dppo_kl")
def dppo_kl(inputs: LossInputs, *, delta: float = 0.05, delta_high: float | None = None, c: float = 20.0) -> TokenLoss:
    """Stop a token whose probability has moved by more than delta, measured by a binary KL.

        loss = −sg(M min(r, c)) A log π,    r = π / μ,    D = μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π))

        M = 0 where D > delta and r has left 1 in the direction of A; 1 elsewhere

    Stricter than `dppo_tv` with tokens that the sampler was nearly sure of, or that it nearly ruled out. μ is what
    sampled: vLLM or a rollout function, and else the old policy.
    Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning" (https://huggingface.co/papers/2602.04879),
    Eq. 11, 12 and 14.

    Args:
        delta: largest KL of a token with a negative advantage, in nats.
        delta_high: largest KL of a token with a positive advantage. None means the same as `delta`.
        c: bound for the ratio, above 1. The paper has none (math.inf), the authors' code and TRL's trainer have 20.
    """
    return _within(inputs, _binary_kl, delta, delta_high, c)


def _within(
    inputs: LossInputs,
    divergence: Callable[[Tensor, Tensor], Tensor],
    delta: float,
    delta_high: float | None,
    c: float,
) -> TokenLoss:
    """The loss of both: policy gradient with a truncated ratio, but for tokens that have left the trust region."""
    delta_high = delta if delta_high is None else delta_high
    if not (delta >= 0 and delta_high >= 0 and c > 1):  # NaN is none of these
        raise ValueError(
            f"delta={delta!r}, delta_high={delta_high!r}, c={c!r}: delta and delta_high must be 0 or more, and c above "
            "1, or tokens that have not moved are scaled. The paper uses 0.15 for dppo_tv and 0.05 for dppo_kl, TRL "
            "c=20.0."
        )
    logps, sampled = inputs.logps.detach(), inputs.behavior_logps
    moved, log_ratio = divergence(sampled, logps), logps - sampled
    below = (inputs.advantages < 0) & (log_ratio < 0) & (moved > delta)
    above = (inputs.advantages > 0) & (log_ratio > 0) & (moved > delta_high)
    weight = torch.where(below | above, 0.0, saturating_exp(log_ratio).clamp(max=c))
    stopped = {"low": below, "high": above, "region": below | above}
    return weighted(inputs, weight, {f"clip_ratio/{side}_mean": tokens.float() for side, tokens in stopped.items()})


def _binary_tv(logps: Tensor, other: Tensor) -> Tensor:
    """Total variation of two distributions over "this token" and "another", from log-probabilities of this token."""
    return (logps.exp() - other.exp()).abs()


def _binary_kl(logps: Tensor, other: Tensor) -> Tensor:
    """KL(p ‖ q) of two distributions over "this token" and "another", from log-probabilities of this token."""
    # expm1 keeps the digits of 1 - p for a p near 1, and a log-probability may be above 0 by rounding. A rest that has
    # been rounded to 0 must not make the KL infinite.
    smallest = torch.finfo(logps.dtype).eps
    rest, other_rest = ((-torch.expm1(values)).clamp(min=smallest) for values in (logps, other))
    return logps.exp() * (logps - other) + rest * (rest / other_rest).log()
