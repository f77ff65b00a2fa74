"""Kernel launches, copies between devices and kept bytes, counted on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grpo_plus.packing import varlen
from tests.launches import Launches


class FlashLaunches(Launches):
    """Launches in which a flash call is one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def as_one(self, name: str, call: Callable[[], Any]) -> Any:
        """Count all that happens in a call as one launch."""
        self.counts[name] += 1
        self.paused = True
        try:
            return call()
        finally:
            self.paused = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return operator(*args, **(kwargs or {}))
        return super().__torch_dispatch__(operator, types, args, kwargs)


@contextmanager
def launches(monkeypatch: Any) -> Iterator[FlashLaunches]:
    """Count what runs inside. A flash call gives zeros here."""
    counted = FlashLaunches()

    def forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return counted.as_one(
            "flash_forward", lambda: (torch.zeros_like(query), query.new_zeros(query.shape[1::-1], dtype=torch.float32))
        )

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return counted.as_one("flash_backward", lambda: tuple(map(torch.zeros_like, (query, key, value))))

    with monkeypatch.context() as patch, counted:
        patch.setattr(varlen, "_plain_forward", forward)
        patch.setattr(varlen, "_plain_backward", backward)
        yield counted


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Bytes of the memory that autograd keeps for the backward, by its address."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
