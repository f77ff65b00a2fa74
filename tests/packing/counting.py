"""Kernel launches, copies between devices and kept bytes, counted on a CPU."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
def launches() -> Iterator[FlashLaunches]:
    """Count what runs inside. A flash call gives zeros here."""
    counted = FlashLaunches()

    def forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return counted.as_one(
            "flash_forward", lambda: (torch.zeros_like(query), query.new_zeros(query.shape[1::-1], dtype=torch.float32))
        )

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return counted.as_one("flash_backward", lambda: tuple(map(torch.zeros_like, (query, key, value))))

    with patch.multiple(varlen, _plain_forward=forward, _plain_backward=backward), counted:
        yield counted


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Bytes of the memory that autograd keeps for the backward, by its address."""
    kept: dict[int, int] = {}
    held = []  # an address that is freed and used again would be counted once or twice, as it happens

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


class CopiesFromHost(TorchDispatchMode):
    """Copies from the CPU to another device, and whether each of them lets the host go on."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name, first = operator._schema.name, args[0] if args else None
        if name == "aten::_to_copy" and first.device.type == "cpu" != result.device.type:
            self.non_blocking.append(bool((kwargs or {}).get("non_blocking")))
        if name == "aten::copy_" and args[1].device.type == "cpu" != first.device.type:
            self.non_blocking.append(bool(args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking")))
        return result


class OnDevice(Tensor):
    """A tensor that stands for one on a device, and so does what is computed from it. `waits` counts the reads."""

    waits: ClassVar[list[str]] = []
    READS: ClassVar[set[str]] = {
        *("cpu", "item", "tolist", "numpy", "nonzero", "unique", "masked_select"),
        *("__bool__", "__int__", "__float__", "__index__"),
    }

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        masked = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
        if masked or name in cls.READS:
            caller = next(f for f in inspect.stack()[1:] if f"{os.sep}torch{os.sep}" not in f.filename)
            if f"{os.sep}grpo_plus{os.sep}" in caller.filename:
                cls.waits.append(f"{name} in {os.path.basename(caller.filename)}:{caller.lineno}")
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(Tensor) if name == "cpu" else result
