"""Losses that hold back the tokens that make the policy's entropy fall.

To first order, a step lowers the entropy by the covariance of log-probability and advantage over the tokens. A few
tokens, probable and with a high advantage, make up nearly all of it. Holding them back keeps exploration alive.
"""

import torch
from torch import Tensor

from grpo_plus.losses.inputs import LossInputs, TokenLoss
from grpo_plus.losses.loss import register
from grpo_plus.losses.ratios import clip, clip_range, token_ratio
from grpo_plus.losses.reduce import average


@register("clip_cov", reduction="global-token-mean", zero_without_advantage=True)
def clip_cov(
    inputs: LossInputs,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    clip_cov_ratio: float = 2e-4,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
) -> TokenLoss:
    """PPO's clip that also drops a few tokens with a high covariance, drawn at random.

        covₜ = (Aₜ − mean(A)) (log πₜ − mean(log π))
        loss = 0 for a share clip_cov_ratio of the tokens (at least one),
               drawn from {t: clip_cov_lb < covₜ < clip_cov_ub}; as `grpo` for the other tokens

    Means and share are those of the given batch, under gradient accumulation of the micro-batch. Tokens that PPO's clip
    has already stopped are not drawn. The draw uses torch's global random numbers, and each process
    draws among its own tokens.
    Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models"
    (https://huggingface.co/papers/2505.22617), section 4.2; defaults as in verl.
    """
    if not (0 < clip_cov_ratio <= 1 and clip_cov_lb < clip_cov_ub):
        raise ValueError(
            f"clip_cov_ratio={clip_cov_ratio!r} must lie in (0, 1] and clip_cov_lb={clip_cov_lb!r} below "
            f"clip_cov_ub={clip_cov_ub!r}. verl uses 2e-4, 1.0 and 5.0."
        )
    loss, metrics = clip(token_ratio(inputs), inputs.advantages, clip_range(epsilon, epsilon_high))
    covariance = _covariance(inputs)
    stopped = metrics["clip_ratio/region_mean"] > 0
    candidates = inputs.mask & ~stopped & (covariance > clip_cov_lb) & (covariance < clip_cov_ub)
    dropped = _draw(candidates, (clip_cov_ratio * inputs.mask.sum()).floor().clamp(min=1))
    return TokenLoss(torch.where(dropped, 0.0, loss), {**metrics, "clip_cov/dropped_mean": dropped.float()})


def _covariance(inputs: LossInputs) -> Tensor:
    """Each token's part of the covariance of advantage and log-probability, (B, T), without gradient."""
    logps, advantages = inputs.logps.detach(), inputs.advantages.expand_as(inputs.logps)
    return (advantages - average(advantages, inputs.mask)) * (logps - average(logps, inputs.mask))


def _draw(candidates: Tensor, count: Tensor) -> Tensor:
    """Draw `count` of the candidates, each with the same probability: bool. Fewer candidates are all drawn."""
    # A rank by random numbers needs no count on the host, which would wait for the device.
    lots = torch.rand(candidates.shape, device=candidates.device).where(candidates, -1.0)
    rank = lots.flatten().argsort(descending=True).argsort().view_as(candidates)
    return candidates & (rank < count)
