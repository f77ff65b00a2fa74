"""Gap between the policy and what samples for it: same weights, other kernels, or a coarser cache."""

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

        ρₜ = π(oₜ) / μ(oₜ),  or ∏ₜ ρₜ for the sequence    outside [low, high]: truncated to the bound, or masked to 0

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


def suspicion(gap: float, step: int) -> str | None:
    """Warning about a sampler that is further from the policy than rounding explains. None for any other sampler.

    Args:
        gap: root mean square of the differences of the log-probabilities that policy and sampler give the same tokens,
            in nats.
    """
    if not gap > SUSPICIOUS:
        return None
    return (
        f"The completions of step {step} were not sampled from the policy that is trained: the log-probabilities that "
        f"both give their tokens differ by {gap:.2f} (root mean square; two engines in bfloat16 differ by about 0.05). "
        "Weights or adapters that did not reach the sampler, a sampler with another base, quantization or temperature, "
        "and truncated sampling (top_p, top_k, min_p: see truncated_sampling) look like this. The updates "
        "are off-policy."
    )


class SamplerGap:
    """Distance of sampler and policy over one generation batch, collected from its micro-batches.

    Every micro-batch is summed up on its device, so that the host waits for none of them.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._extremes: list[Tensor] = []
        self._without = math.nan  # the figures of no token

    def add(self, logps: Tensor, sampler_logps: Tensor, mask: Tensor, ratio: Tensor | None = None) -> None:
        """Add a micro-batch: the arguments of `sampler_ratio`, and its result. None: the ratio without bounds."""
        differences = (logps - sampler_logps).float()
        known = mask & ~differences.isnan()
        differences = differences.where(known, 0.0)
        if ratio is None:
            ratio, mask = differences.exp(), known
        else:
            self._without = 0.0  # as in TRL's log of such ratios
        weighed = mask if ratio.shape == mask.shape else torch.ones_like(ratio, dtype=torch.bool)
        # Without a token, the extremes are infinite.
        self._extremes.append(
            torch.stack([-differences.abs().max(), *(r.where(weighed, math.inf).min() for r in (ratio, -ratio))])
        )
        sums = differences.abs(), differences.square(), known, ratio.where(weighed, 0.0), weighed
        self._sums.append(torch.stack([value.sum(dtype=torch.float32) for value in sums]))

    def copy(self) -> "SamplerGap":
        """A gap that goes on by itself."""
        gap = SamplerGap()
        gap._sums, gap._extremes, gap._without = list(self._sums), list(self._extremes), self._without
        return gap

    def root_mean_square(self) -> Tensor:
        """Of the differences of this process. 0 where nothing was sampled."""
        if not self._sums:
            return torch.zeros(())
        _, squares, tokens, _, _ = torch.stack(self._sums).sum(0)
        return (squares / tokens.clamp(min=1)).sqrt()

    def figures(self, device: torch.device) -> Tensor:
        """Figures of this process, (5,), in the order of `FIGURES`.

        Where no token was sampled, 0 if `add` was given ratios, and else NaN.
        """
        if not self._sums:
            return torch.full((len(FIGURES),), torch.nan, device=device)
        differences, _, tokens, ratios, weighed = torch.stack(self._sums).sum(0)
        furthest, least, most = torch.stack(self._extremes).amin(0)
        mean, mean_ratio = differences / tokens.clamp(min=1), ratios / weighed.clamp(min=1)
        return torch.stack([mean, -furthest, least, mean_ratio, -most]).where(weighed > 0, self._without)


def joined(figures: Tensor) -> dict[str, float]:
    """One number per figure, by name, from `SamplerGap.figures` of all processes, (processes, 5)."""
    return {name: float(join(figures[:, column])) for column, (name, join) in enumerate(FIGURES.items())}
