"""Inputs of checkpointed layers wait for their backward in the host's memory.

Gradient checkpointing keeps one (N, H) input per layer. Here the input of a layer leaves the device while the layer
computes, and comes back while the layer above it is in its backward. Both copies run on a stream of their own, out of
and into pinned memory, so that neither the host nor the computation waits for them. The numbers are the same.

Three others do nearly this. transformers' `gradient_checkpointing_kwargs={"offload": True}` copies on the stream that
computes, and TRL's GRPOTrainer hands the keyword to torch's checkpoint after its first generation, which refuses it.
TRL's `OffloadActivations` (SFT, DPO) takes everything that a forward saves, the head's input included. It waits for
the device at the end of every forward, brings nothing back ahead of time, and cannot be made on a CPU.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20  # ASSUMED: below a MiB, starting the copies takes the host longer than the memory is worth
# torch rounds pinned memory up to a power of two. Pieces keep what that wastes below a piece.
PIECE_BYTES = 2**25
COPIES_ASIDE = ("cuda",)  # kinds of device that compute and copy at the same time


class Offload:
    """Takes the inputs of checkpointed layers to the host.

    Args:
        least_bytes: size of the smallest input that leaves.
    """

    def __init__(self, least_bytes: int = LEAST_BYTES) -> None:
        self.least_bytes = least_bytes
        self._sides: dict[torch.device, _Side] = {}
        self._newest: weakref.ref[_Input] | None = None
        self._ahead: _Input | None = None

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Offload, inside, where the model's layers are checkpointed. The backward belongs inside."""
        layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        before = [(layer, layer._gradient_checkpointing_func) for layer in layers]
        for layer, checkpoint in before:
            layer._gradient_checkpointing_func = partial(self._checkpoint, checkpoint)
        try:
            yield
        finally:
            for layer, checkpoint in before:
                layer._gradient_checkpointing_func = checkpoint
            self._expect(None)

    def _checkpoint(
        self, checkpoint: Callable[..., Any], layer: Callable[..., Any], hidden_states: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Checkpoint a layer as `checkpoint` does. Masks and positions stay: all layers share them."""
        if not isinstance(hidden_states, Tensor):
            return checkpoint(layer, hidden_states, *args, **kwargs)
        with saved_tensors_hooks(partial(self._pack, _place(hidden_states)), self._unpack):
            return checkpoint(layer, hidden_states, *args, **kwargs)

    def _pack(self, place: tuple[Any, ...], saved: Tensor) -> "Tensor | _Input":
        if _place(saved) != place or not saved.is_contiguous() or saved.nbytes < self.least_bytes:
            return saved
        newest = None if self._newest is None else self._newest()
        packed = _Input(saved, newest, self._side(saved.device))
        if newest is not None:
            newest.leave()
        self._newest = weakref.ref(packed)
        return packed

    def _unpack(self, packed: "Tensor | _Input") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        packed.fetch()
        hidden_states = packed.take()
        if packed is self._ahead:
            self._ahead = None
        self._expect(packed.below())
        return hidden_states

    def _expect(self, packed: "_Input | None") -> None:
        """Fetch the input that the backward will probably ask for next, in the place of an earlier guess."""
        if self._ahead is not None:
            self._ahead.leave()
        self._ahead = packed
        if packed is not None:
            packed.fetch()

    def _side(self, device: torch.device) -> "_Side":
        if device not in self._sides:
            self._sides[device] = _Side(device)
        return self._sides[device]


class _Input:
    """A layer's input. It is on the device until `leave`, and again between `fetch` and `take`.

    Attributes:
        below: the input of the layer before it, or None if that is gone.
    """

    def __init__(self, hidden_states: Tensor, below: "_Input | None", side: "_Side") -> None:
        self.below: Callable[[], _Input | None] = (lambda: None) if below is None else weakref.ref(below)
        self._side, self._shape = side, hidden_states.shape
        self._on_device: Tensor | None = hidden_states
        pieces = _pieces(hidden_states)
        pinned = side.stream is not None
        self._on_host = [torch.empty_like(piece, device="cpu", pin_memory=pinned) for piece in pieces]
        self._copied = side.copy(self._on_host, pieces)

    def leave(self) -> None:
        """Free the memory on the device, once the copy is made."""
        self._side.wait(self._copied)
        self._on_device = None

    def fetch(self) -> None:
        """Begin to copy to the device."""
        if self._on_device is None:
            # Memory of the stream that computes, which goes on to free it. The copy waits until that stream is here.
            first = self._on_host[0]
            self._on_device = torch.empty(self._shape, dtype=first.dtype, device=self._side.device)
            self._copied = self._side.copy(_pieces(self._on_device), self._on_host)

    def take(self) -> Tensor:
        """Hidden states for what is computed from here on. The device waits for the copy, the host does not."""
        assert self._on_device is not None
        hidden_states = self._on_device
        self.leave()
        return hidden_states


class _Side:
    """A stream for copies beside the stream that computes. Devices of other kinds copy as they compute."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device) if device.type in COPIES_ASIDE else None
        self.stream: Any = None if self._module is None else self._module.Stream(device)

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> Any:
        """Copy, after all that the computation has been given so far. Returns the event to `wait` for."""
        if self._module is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return None
        self.stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let what is computed from here on wait for a copy."""
        if event is not None:
            self._module.current_stream(self.device).wait_event(event)


def _pieces(tensor: Tensor) -> list[Tensor]:
    return list(tensor.view(-1).split(max(1, PIECE_BYTES // tensor.element_size())))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
