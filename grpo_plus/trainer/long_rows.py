"""What lets a device hold longer rows, decided once, when the trainer is built."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn
from trl import GRPOTrainer

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.models.offload import COPIES_ASIDE, Offload


class LongRows:
    """What changes the layers for an update: from its first forward to the end of its backward.

    Not from the start of TRL's step on, in which TRL may generate first, and sets up gradient checkpointing anew.

    Args:
        changes: each takes a model and changes its layers, inside.
    """

    def __init__(self, changes: Sequence[Callable[[nn.Module], AbstractContextManager[None]]]) -> None:
        self._changes = changes
        self._step: ExitStack | None = None
        self._changed: list[nn.Module] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let a `forward` that builds a graph change its model until this context ends, with the backward inside."""
        with ExitStack() as self._step:
            try:
                yield
            finally:
                self._step = None
                self._changed.clear()

    def forward(self, model: nn.Module) -> None:
        """Change the model for a forward that builds a graph. Outside of a `step`, nobody knows its backward."""
        if self._step is None or not torch.is_grad_enabled() or any(model is changed for changed in self._changed):
            return
        for change in self._changes:
            self._step.enter_context(change(model))
        self._changed.append(model)


def long_rows_of(trainer: GRPOTrainer, config: GRPOPlusConfig, no_own_layers: str | None) -> LongRows:
    """What of the configuration lets this trainer's device hold longer rows.

    Args:
        no_own_layers: reason why the run's layers must stay as they are. None where there is no reason.

    Raises:
        ValueError: something that was asked for cannot be had.
    """
    offload = _offload(trainer, config, no_own_layers)
    return LongRows([] if offload is None else [offload.of])


def _offload(trainer: GRPOTrainer, config: GRPOPlusConfig, no_own_layers: str | None) -> Offload | None:
    if not config.offload_activations:
        return None
    if no_own_layers is not None:
        raise ValueError(
            f"offload_activations=True is not possible: {no_own_layers}. Change that, or leave offload_activations "
            "unset."
        )
    kind = trainer.accelerator.device.type
    if kind not in COPIES_ASIDE:
        warnings.warn(
            f"offload_activations: no effect on a device of type {kind!r}, whose memory is the host's own. Leave "
            "offload_activations unset.",
            stacklevel=2,
        )
        return None
    return Offload()
