"""Gap between the policy and the inference engine that samples for it: same weights, other kernels."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

SamplerMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# What TRL logs under `sampling/`, in the order of `SamplerGap.figures`, and how it joins the processes' figures.
FIGURES: dict[str, Callable[[Tensor], Tensor]] = {
    "sampling_logp_difference/mean": torch.mean,
    "sampling_logp_difference/max": torch.amax,
    "importance_sampling_ratio/min": torch.amin,
    "importance_sampling_ratio/mean": torch.nanmean,
    "importance_sampling_ratio/max": torch.amax,
}


# Users measured a root mean square of 0.03 to 0.055 nats between vLLM and a trainer in bfloat16, on 0.5 B models
# (huggingface/trl#6789, ServiceNow/Fast-LLM#525). Several times that is no rounding.
SUSPICIOUS = 0.2


def sampler_ratio(
    logps: Tensor, sampler_logps: Tensor, mask: Tensor, *, mode: SamplerMode, low: float | None, high: float | None
) -> Tensor:
    """Bounded ratio of the probabilities that the policy π and the engine μ give to what the engine sampled.

    ρₜ = π(oₜ) / μ(oₜ),  or ∏ₜ ρₜ for the sequence        outside [low, high]: truncated to the bound, or masked to 0

    A loss that is weighted with this ratio is corrected for tokens that were not drawn from π. Without bounds, a single
    token could outweigh the batch.
    Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (truncation).

    Args:
        logps, sampler_logps: (B, T). NaN where the engine has no value, which counts as no difference.
        mask: (B, T) booleans, true where the token was sampled.
        low, high: bounds of the ratio. None sets no bound.

    Returns:
        (B, T) in the token modes, 1 where masked. (B, 1) in the sequence modes.
    """
    level, bounding = mode.split("_")
    log_ratio = torch.where(mask, logps - sampler_logps, 0.0).nan_to_num(nan=0.0)
    ratio = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    bounds = (0.0 if low is None else low, math.inf if high is None else high)
    if bounding == "truncate":
        return ratio.clamp(*bounds)
    return ratio.where((ratio >= bounds[0]) & (ratio <= bounds[1]), 0.0)


def sampler_differences(logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
    """log π(oₜ) − log μ(oₜ) of the sampled tokens for which the engine has a value: (B, T) each -> (n,)."""
    differences = (logps - sampler_logps)[mask]
    return differences[~differences.isnan()]


def suspicion(differences: Tensor, step: int) -> str | None:
    """Warning about a sampler that is further from the policy than rounding explains. None for any other sampler.

    Args:
        differences: (n,) differences of the log-probabilities that policy and sampler give the same tokens, in nats.
    """
    gap = math.sqrt(differences.float().square().mean().item()) if differences.numel() else 0.0
    if gap <= SUSPICIOUS:
        return None
    return (
        f"The completions of step {step} were not sampled from the policy that is trained: the log-probabilities that "
        f"both give their tokens differ by {gap:.2f} (root mean square; two engines in bfloat16 differ by about 0.05). "
        "Weights or adapters that did not reach the sampler, a sampler with another base, quantization or temperature, "
        "and truncated sampling (top_p, top_k, min_p) look like this. The updates are off-policy."
    )


class SamplerGap:
    """Distance of engine and policy over one generation batch, collected from its micro-batches."""

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._ratios: list[Tensor] = []

    def add(self, logps: Tensor, sampler_logps: Tensor, mask: Tensor, ratio: Tensor) -> None:
        """Add a micro-batch: the arguments of `sampler_ratio`, and its result."""
        self._differences.append(sampler_differences(logps, sampler_logps, mask))
        self._ratios.append(ratio[mask] if ratio.shape == mask.shape else ratio.flatten())

    def differences(self) -> Tensor:
        """`sampler_differences` of all micro-batches, (n,)."""
        return torch.cat(self._differences)

    def figures(self) -> Tensor:
        """Figures of this process, (5,), in the order of `FIGURES`. 0 where nothing was sampled."""
        differences, ratios = (
            values if values.numel() else values.new_zeros(1)
            for values in (self.differences().abs(), torch.cat(self._ratios))
        )
        return torch.stack([differences.mean(), differences.max(), ratios.min(), ratios.mean(), ratios.max()])


def joined(figures: Tensor) -> dict[str, float]:
    """One number per figure, by name, from `SamplerGap.figures` of all processes, (processes, 5)."""
    return {name: float(join(figures[:, column])) for column, (name, join) in enumerate(FIGURES.items())}
