"""What lets a device hold longer rows, decided once, when the trainer is built."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn
from trl import GRPOTrainer

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.config.speed import AUTO_TILES, is_reentrant
from grpo_plus.models.offload import COPIES_ASIDE, Offload
from grpo_plus.models.tiles import Tiles

TILE_TOKENS = 4096  # as many as in a tile of TRL's head


class LongRows:
    """What changes the layers for scoring, and for an update from its first forward to the end of its backward.

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

    @contextmanager
    def forward(self, model: nn.Module) -> Iterator[None]:
        """Compute a forward on the changed model. Outside of a `step`, nobody knows the backward of a graph."""
        if not torch.is_grad_enabled():
            with ExitStack() as stack:
                self._change(model, stack)
                yield
            return
        if self._step is not None and not any(model is changed for changed in self._changed):
            self._change(model, self._step)
            self._changed.append(model)
        yield

    def _change(self, model: nn.Module, stack: ExitStack) -> None:
        for change in self._changes:
            stack.enter_context(change(model))


def long_rows_of(trainer: GRPOTrainer, config: GRPOPlusConfig, no_own_layers: str | None) -> LongRows:
    """What of the configuration lets this trainer's device hold longer rows.

    Args:
        no_own_layers: reason why the run's layers must stay as they are. None where there is no reason.

    Raises:
        ValueError: something that was asked for cannot be had.
    """
    parts = (_tiles(config, no_own_layers), _offload(trainer, config, no_own_layers))
    return LongRows([part.of for part in parts if part is not None])


def _tiles(config: GRPOPlusConfig, no_own_layers: str | None) -> Tiles | None:
    tokens = config.mlp_tile_tokens
    if tokens != AUTO_TILES:
        if tokens is not None and no_own_layers is not None:
            raise ValueError(
                f"mlp_tile_tokens={tokens} is not possible: {no_own_layers}. Change that, or leave mlp_tile_tokens "
                "unset."
            )
        return None if tokens is None else Tiles(int(tokens))
    # Without a checkpoint that stops early, a tile's backward is the MLP's only further forward.
    stops_early = config.gradient_checkpointing and not is_reentrant(config)
    return Tiles(TILE_TOKENS) if stops_early and no_own_layers is None else None


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
