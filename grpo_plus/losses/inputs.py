"""What a policy loss sees and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """What a policy loss may look at. `mask` already selects the tokens that count; losses never re-derive it.

    Construction checks the shapes, makes the mask boolean, detaches everything but `logps`, and overwrites what the
    mask hides: log-probabilities and advantages by 0 (so the ratio is 1), the sampler's ratio by 1. Whatever stood
    there, NaN and infinity included, reaches neither a loss nor a gradient.

    Attributes:
        logps: (B, T) log-probabilities of the completions' tokens under the policy; only they carry a gradient.
        old_logps: (B, T) the same under the policy that is being improved; `logps.detach()` right after generation.
        advantages: (B, 1) or (B, T).
        mask: (B, T), true where the token is the policy's own and is trained.
        ref_logps: (B, T) under the reference policy, or None where there is no KL term.
        importance_sampling_ratio: (B, T) or (B, 1) old policy over sampler (vLLM), or None where they are the same.

    Raises:
        ValueError: two shapes do not fit together.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    importance_sampling_ratio: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logps.dim() != 2:
            raise ValueError(f"LossInputs.logps has shape {tuple(self.logps.shape)}; (B, T) is needed.")
        for name in ("old_logps", "mask", "ref_logps"):
            self._check_shape(name, per_row=False)
        for name in ("advantages", "importance_sampling_ratio"):
            self._check_shape(name, per_row=True)
        # The dataclass is frozen for its users; only here are the fields replaced by their cleaned selves.
        object.__setattr__(self, "mask", self.mask.detach().bool())
        object.__setattr__(self, "logps", torch.where(self.mask, self.logps, 0.0))
        for name, hidden in {
            "old_logps": 0.0,
            "advantages": 0.0,
            "ref_logps": 0.0,
            "importance_sampling_ratio": 1.0,
        }.items():
            object.__setattr__(self, name, self._cleaned(getattr(self, name), hidden))

    @property
    def log_ratio(self) -> Tensor:
        """(B, T) log π/π_old of each token; 0 where masked."""
        return self.logps - self.old_logps

    @property
    def lengths(self) -> Tensor:
        """(B, 1) number of tokens that count, at least 1 so that one may divide by it."""
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
    """What a loss function returns: one number per token or per row, for `reduce` to mask and sum.

    Attributes:
        loss: (B, T), or (B, 1) for a loss of the whole sequence; before masking.
        metrics: name -> (B, T) or (B, 1) values to log; `average` turns them into one number.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = MappingProxyType({})
