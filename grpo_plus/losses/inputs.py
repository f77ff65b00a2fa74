"""Inputs of a policy loss, and its result."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """Everything that a policy loss may look at. `mask` already selects the tokens that count.

    Construction checks the shapes, makes the mask boolean, and detaches everything but `logps`. It also overwrites what
    the mask hides, so that NaN and infinity there reach neither a loss nor a gradient. Hidden log-probabilities and
    advantages become 0 (the ratio is then 1). A hidden ratio to the sampler becomes 1.

    Attributes:
        logps: (B, T) log-probabilities of the completions' tokens under the policy. Only they carry a gradient.
        old_logps: (B, T) log-probabilities under the policy before its update; right after generation `logps.detach()`.
        advantages: (B, 1) or (B, T).
        mask: (B, T), true where the policy wrote the token and trains on it.
        ref_logps: (B, T) log-probabilities under the reference policy. None where there is no KL term.
        importance_sampling_ratio: (B, T) or (B, 1), old policy over sampler (vLLM). None where the two are the same.
        sampling_logps: (B, T) log-probabilities that the sampler (vLLM, a rollout function) gave its tokens. NaN where
            the sampler has no value. None where it reports none.

    Raises:
        ValueError: two shapes do not fit together.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    importance_sampling_ratio: Tensor | None = None
    sampling_logps: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logps.dim() != 2:
            raise ValueError(f"LossInputs.logps has shape {tuple(self.logps.shape)}; (B, T) is needed.")
        for name in ("old_logps", "mask", "ref_logps", "sampling_logps"):
            self._check_shape(name, per_row=False)
        for name in ("advantages", "importance_sampling_ratio"):
            self._check_shape(name, per_row=True)
        # The dataclass is frozen for its users. Only here are the fields replaced, by their cleaned values.
        object.__setattr__(self, "mask", self.mask.detach().bool())
        object.__setattr__(self, "logps", torch.where(self.mask, self.logps, 0.0))
        for name, hidden in {
            "old_logps": 0.0,
            "advantages": 0.0,
            "ref_logps": 0.0,
            "importance_sampling_ratio": 1.0,
            "sampling_logps": 0.0,
        }.items():
            object.__setattr__(self, name, self._cleaned(getattr(self, name), hidden))

    @property
    def log_ratio(self) -> Tensor:
        """log π/π_old of each token, (B, T). 0 where masked."""
        return self.logps - self.old_logps

    @property
    def behavior_logps(self) -> Tensor:
        """Log-probabilities under what sampled the tokens, (B, T): the sampler's own, and else the old policy's."""
        if self.sampling_logps is None:
            return self.old_logps
        return torch.where(self.sampling_logps.isnan(), self.old_logps, self.sampling_logps)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens that count in each row, (B, 1). At least 1, for a divisor."""
        return self.mask.sum(-1, keepdim=True).clamp(min=1)

    def _check_shape(self, name: str, *, per_row: bool) -> None:
        value = getattr(self, name)
        rows, tokens = self.logps.shape
        allowed = {(rows, tokens), (rows, 1)} if per_row else {(rows, tokens)}
        if value is not None and tuple(value.shape) not in allowed:
            advice = f" For one value per row write {name}.unsqueeze(1)." if per_row else ""
            raise ValueError(
                f"LossInputs.{name} has shape {tuple(value.shape)} beside logps of shape {(rows, tokens)}; "
                f"{' or '.join(map(str, sorted(allowed)))} is needed.{advice}"
            )

    def _cleaned(self, value: Tensor | None, hidden: float) -> Tensor | None:
        if value is None:
            return None
        counts = self.mask if value.shape == self.mask.shape else self.mask.any(-1, keepdim=True)
        return torch.where(counts, value.detach(), hidden)


class TokenLoss(NamedTuple):
    """Result of a loss function: one number per token or per row, which `reduce` masks and sums.

    Attributes:
        loss: (B, T) before masking, or (B, 1) for a loss of the whole sequence.
        metrics: name -> (B, T) or (B, 1) values to log. `average` turns each entry into one number.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = MappingProxyType({})
