"""Means over the tokens of an optimizer step and over all processes, for the log and for beta.

TRL logs the mean of its micro-batches' means. That counts a short micro-batch as much as a long one, and one without a
scored token as 0. Which rows share a micro-batch changes under `packing`, and a mean over the step does not.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_plus.packing import Packed, PaddedRows
from grpo_plus.packing.transfer import on_device
from grpo_plus.rollout import Statistics
from grpo_plus.trainer.names import REFILL_AGE, metrics_of, trained_tokens

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam

KL, ENTROPY = "kl", "entropy"
FOR_BETA = "kl, which TRL logs itself"
BUFFERED_RATIO = "sampling/buffered_ratio"
TOKEN_RATIO, LIVE_FRACTION = "packing/token_ratio", "packing/live_fraction"
TOKENS_PER_SECOND, LIVE_ROWS, PROMPT_SHARING, PREFILL_RATIO = (
    f"rollout/{name}" for name in ("tokens_per_second", "live_rows", "prompt_sharing", "prefill_ratio")
)
# TRL's means over tokens. The second kind are means over rows where a row has one importance ratio.
OVER_TOKENS = (KL, ENTROPY)
OVER_RATIOS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")


@dataclass(frozen=True)
class Part:
    """What a micro-batch adds to a figure: `factor * total` to its sum, and `count` to what it is divided by.

    Tensors are float32 on the device. They are read at the end of the step, since each read waits for the device.
    """

    name: str
    factor: float
    total: float | Tensor
    count: float | Tensor


class StepFigures:
    """Collects the figures of an optimizer step from its micro-batches.

    Args:
        weighs: whether TRL's means over tokens are logged over the step, too. Else the log has them as TRL wrote them.
        packs: whether rows may be skipped or go through the model without padding.
    """

    def __init__(self, trainer: "TRLSeam", *, weighs: bool, packs: bool) -> None:
        self._trainer = trainer
        self._weighs = weighs
        self._packs = packs
        self._logged: dict[str, int] = {}
        self._forward: tuple[Tensor, tuple[int, ...] | None] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a training: an earlier one may have ended within a step."""
        self._parts: list[Part] = []

    def copy(self) -> list[Part]:
        """What the micro-batches of the step have added."""
        return list(self._parts)

    def go_back_to(self, parts: list[Part]) -> None:
        """Forget what has been added since the copy."""
        self._parts = list(parts)

    def rolled_out(self, done: Statistics) -> None:
        """Take note of what was generated. Every process does, also where it has generated nothing itself."""
        self._add(TOKENS_PER_SECOND, done.new_tokens, done.seconds)
        self._add(LIVE_ROWS, done.row_steps, done.steps)
        self._add(PROMPT_SHARING, done.rows, done.prompts)
        self._add(PREFILL_RATIO, done.prompt_tokens, done.prefilled)

    def begin(self) -> None:
        """Before the loss of a micro-batch."""
        self._logged = {name: len(values) for name, values in metrics_of(self._trainer).items()}
        self._forward = None

    def forwarded(self, rows: PaddedRows, packed: Packed | None, entropies: Tensor | None) -> None:
        """Take note of the forward in the loss of a micro-batch."""
        if entropies is not None:
            self._forward = entropies.detach(), rows.live
        if packed is not None and self._trainer.model.training:
            count = len(rows.input_ids)
            self._add(TOKEN_RATIO, rows.input_ids.numel(), packed.tokens)
            self._add(LIVE_FRACTION, count if rows.live is None else len(rows.live), count)

    def refilled(self, inputs: dict[str, Any], logps: Tensor) -> None:
        """Take note of how far the policy (B, T) has moved from those that sampled the rows of the buffer."""
        if self._trainer.model.training and REFILL_AGE in inputs:
            mask = trained_tokens(inputs) * (inputs[REFILL_AGE] > 0).unsqueeze(1)
            ratio = (logps - inputs["old_per_token_logps"]).exp()
            self.add(BUFFERED_RATIO, ratio, mask * self._forwarded_rows(mask))

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add (B, T) values of the mask's tokens, or (B, 1) values of the rows, of a micro-batch."""
        if values.shape != mask.shape:
            mask = torch.ones_like(values)
        elif name == ENTROPY:
            mask = mask * self._forwarded_rows(mask)
        # A masked value may be NaN.
        self._add(name, values.where(mask.bool(), 0.0).float().sum(), mask.sum().float())

    def take(self, inputs: dict[str, Any]) -> None:
        """Take up what TRL has logged of a micro-batch since `begin`."""
        metrics, mask = metrics_of(self._trainer), trained_tokens(inputs)
        if self._packs and self._trainer.model.training:  # on every process, even where nothing was packed
            self._add(TOKEN_RATIO, 0, 0)
            self._add(LIVE_FRACTION, 0, 0)
        by_token = self._trainer.importance_sampling_level == "token"
        for name in (*OVER_TOKENS, *(OVER_RATIOS if by_token else ())):
            if len(metrics.get(name, ())) == self._logged.get(name, 0):
                continue
            if name == ENTROPY and self._weighs and self._forward is not None:
                metrics[name].pop()
                self.add(name, self._forward[0], mask)
            elif self._weighs or name == KL:
                # Each process has the mean of all processes: its own tokens weigh it.
                value = metrics[name].pop() if self._weighs else metrics[name][-1]
                tokens = mask.sum().float()
                self._add(name if self._weighs else FOR_BETA, tokens, tokens, factor=value)

    def log(self) -> float | None:
        """Log the figures of the step, or of a batch of an evaluation. Figures of no token are left out.

        Returns:
            The mean KL per token. None where there is none.
        """
        parts, self._parts = self._parts, []
        means = {name: total / count for name, (total, count) in self._of_all_processes(_sums(parts)).items() if count}
        metrics = metrics_of(self._trainer)
        for name in [name for name, values in metrics.items() if not values]:
            del metrics[name]  # TRL would log None
        kl = means.pop(FOR_BETA, means.get(KL))
        for name, value in means.items():
            metrics[name].append(value)
        return kl

    def _of_all_processes(self, sums: dict[str, list[float]]) -> dict[str, list[float]]:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1 or not sums:
            return sums
        names = sorted(sums)
        table = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=accelerator.device)
        return dict(zip(names, accelerator.reduce(table, reduction="sum").tolist(), strict=True))

    def _add(self, name: str, total: float | Tensor, count: float | Tensor, factor: float = 1.0) -> None:
        self._parts.append(Part(name, factor, total, count))

    def _forwarded_rows(self, mask: Tensor) -> Tensor:
        """(B, 1), 1 for the rows that went through the model: the entropy of the others is not known."""
        live = None if self._forward is None else self._forward[1]
        if live is None:
            return torch.ones_like(mask[:, :1])
        return torch.zeros_like(mask[:, :1]).index_fill(0, on_device(torch.tensor(live), mask.device), 1)


def _sums(parts: list[Part]) -> dict[str, list[float]]:
    """Sum and count of each figure, after one copy to the host."""
    tensors = [value for part in parts for value in (part.total, part.count) if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    sums: dict[str, list[float]] = {}
    for part in parts:
        total, count = (next(read) if isinstance(value, Tensor) else value for value in (part.total, part.count))
        before = sums.get(part.name, [0.0, 0.0])
        sums[part.name] = [before[0] + part.factor * total, before[1] + count]
    return sums


def step_figures_of(trainer: "TRLSeam") -> StepFigures:
    """For a run with its speed-ups decided. The log stays TRL's where no row is moved or left out."""
    speed = trainer.speed
    moved = speed.skips or speed.keeps_prompts_together or trainer.mask_truncated_completions
    return StepFigures(trainer, weighs=trainer.has_own_fields and moved, packs=speed.packer is not None or speed.skips)
