"""What of the seam computes a micro-batch again, in smaller passes, after its update ran out of memory.

Everything is then as it was before the forward: the gradients of earlier micro-batches, the random states, the figures
of the step, and what a loss moves. The second try therefore gives the update of a card with more memory, up to the
order of its sums.
"""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from trl import GRPOTrainer

from grpo_plus.losses.sampler import SamplerGap
from grpo_plus.models.adapters import has_adapters
from grpo_plus.models.memory import is_out_of_memory
from grpo_plus.trainer.names import MOVED_BY_A_LOSS, metrics_of, multimodal
from grpo_plus.trainer.rollouts.sampler_ratio import SamplerRatio
from grpo_plus.trainer.safety.guard import STEPS_WITHIN_BACKWARD
from grpo_plus.trainer.saving.position import RandomStates
from grpo_plus.trainer.saving.saving import SavingSeam
from grpo_plus.trainer.speed import Speed
from grpo_plus.trainer.update.step_figures import Part, StepFigures

logger = logging.getLogger("grpo_plus")


@dataclass(frozen=True)
class Gradients:
    """Gradients of earlier micro-batches, which a failed backward must leave as they were.

    parameters: what trains.
    before: their gradients.
    versions: of these gradients. torch counts what is written into a tensor.
    are_aside: whether the backward writes to gradients of its own.
    """

    parameters: Sequence[Tensor]
    before: Sequence[Tensor | None]
    versions: Sequence[int]
    are_aside: bool

    @classmethod
    def of(cls, model: Any) -> Self:
        """Take note of the gradients. Those of adapters are put aside, since a second set of these is small."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in parameters]
        kept = cls(parameters, before, _versions(before), has_adapters(model))
        if kept.are_aside:
            _give(parameters, [None] * len(parameters))
        return kept

    @property
    def are_intact(self) -> bool:
        """Whether nothing has been written into them."""
        return list(self.versions) == _versions(self.before)

    def put_back(self) -> None:
        """Give the parameters the gradients that they had."""
        _give(self.parameters, self.before)

    @torch.no_grad()
    def add(self) -> None:
        """Add what the backward found to what was put aside."""
        if not self.are_aside:
            return
        found = [parameter.grad for parameter in self.parameters]
        pairs = list(zip(self.before, found, strict=True))
        both = [(before, new) for before, new in pairs if before is not None and new is not None]
        if both:
            torch._foreach_add_(*map(list, zip(*both, strict=True)))
        _give(self.parameters, [new if before is None else before for before, new in pairs])


def _versions(gradients: Sequence[Tensor | None]) -> list[int]:
    return [0 if gradient is None else gradient._version for gradient in gradients]


def _give(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


@dataclass(frozen=True)
class Attempt:
    """An update of one micro-batch, and all that it moves as it was before.

    inputs: the micro-batch.
    moved: attributes of the trainer.
    logged: number of values of each figure in TRL's log.
    figures, gap: what the earlier micro-batches have added to ours.
    """

    inputs: dict[str, Any]
    gradients: Gradients
    random: RandomStates
    moved: Mapping[str, Any]
    logged: Mapping[str, int]
    figures: list[Part]
    gap: SamplerGap

    @property
    def row_tokens(self) -> Tensor:
        """Tokens of each row without its padding, (B,)."""
        return self.inputs["prompt_mask"].sum(1) + self.inputs["completion_mask"].sum(1)

    def smaller_pass(self, bound: int | None) -> int | None:
        """Tokens of the passes to try after those of `bound` tokens. None where a pass is down to one row."""
        tokens = min(limit for limit in (bound, int(self.row_tokens.sum())) if limit is not None)
        return None if tokens <= int(self.row_tokens.max()) else tokens // 2

    def advice(self, bound: int | None) -> str:
        """What to change, where no smaller passes can be tried after those of `bound` tokens."""
        tokens = self.smaller_pass(bound)
        if tokens is None:
            return (
                f"An update ran out of memory with one row at a time, the longest of {int(self.row_tokens.max())} "
                "tokens. `grpo-plus plan` proposes what saves memory, cheapest first: for example "
                "offload_activations=True, or a shorter max_completion_length."
            )
        return (
            "An update ran out of memory when its backward had already changed the gradients of earlier micro-batches, "
            f"so it cannot be computed again. Set max_tokens_per_pass={tokens} and resume."
        )

    def undo(self, trainer: GRPOTrainer) -> None:
        """Bring back what the failed update has moved, but for the figures of ours."""
        self.gradients.put_back()
        self.random.restore()
        vars(trainer).update(self.moved)
        metrics = metrics_of(trainer)
        for name in list(metrics):
            del metrics[name][self.logged.get(name, 0) :]
            if name not in self.logged:
                del metrics[name]


class RetryingSeam(SavingSeam):
    """A trainer that halves the passes of a micro-batch, and computes it again, where its update runs out of memory."""

    speed: Speed
    _step_figures: StepFigures
    _sampler: SamplerRatio
    _attempt: Attempt | None = None
    _again: dict[str, Any] | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one micro-batch."""
        try:
            while (loss := self._try(*args, **kwargs)) is None:
                self._go_back()
            return loss
        finally:
            self._attempt = self._again = None

    def _try(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """One attempt at it. None where the memory ran out and smaller passes may need less."""
        try:
            with self.speed.around_update():
                loss: Tensor = super().training_step(*args, **kwargs)
        except RuntimeError as failure:
            if not is_out_of_memory(failure):
                raise
            if self._smaller_pass() is None:
                if self._attempt is not None:
                    logger.warning(self._attempt.advice(self.speed.passes.tokens))
                raise
            return None  # what the failed attempt holds goes with its traceback
        if self._attempt is not None:
            self._attempt.gradients.add()
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of a micro-batch, which begins an attempt."""
        if self.model.training and self.speed.passes.adapts:
            self.speed.passes.read(inputs["prompt_ids"].shape[1])
            if self._can_try_again(inputs):
                self._attempt = self._begin(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch) if self._again is None else self._again
        return inputs

    def _can_try_again(self, inputs: dict[str, Any]) -> bool:
        """Whether a second try of the micro-batch could be exact, and would be smaller."""
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        is_text = not multimodal(inputs)
        # Other processes would wait for this one in their backward.
        is_alone = self.accelerator.num_processes == 1
        return is_alone and is_text and not any(part in optimizer for part in STEPS_WITHIN_BACKWARD)

    def _begin(self, inputs: dict[str, Any]) -> Attempt:
        return Attempt(
            inputs,
            Gradients.of(self.model),
            RandomStates.now(),
            moved={name: vars(self)[name] for name in MOVED_BY_A_LOSS if name in vars(self)},
            logged={name: len(values) for name, values in metrics_of(self).items()},
            figures=self._step_figures.copy(),
            gap=self._sampler.copy(),
        )

    def _smaller_pass(self) -> int | None:
        if self._attempt is None or not self._attempt.gradients.are_intact:
            return None
        return self._attempt.smaller_pass(self.speed.passes.tokens)

    def _go_back(self) -> None:
        """To the start of the micro-batch, with smaller passes."""
        attempt, tokens = self._attempt, self._smaller_pass()
        assert attempt is not None
        assert tokens is not None
        self._attempt = None
        attempt.undo(self)
        self._step_figures.go_back_to(attempt.figures)
        self._sampler.go_back_to(attempt.gap)
        self._again = attempt.inputs
        self.speed.passes.shrink(tokens)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
