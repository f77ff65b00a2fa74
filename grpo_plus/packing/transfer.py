"""Index tensors from the host to the model's device, many in one copy that nobody waits for."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

# A copy that does not wait would read the buffer after it is freed: these devices do not keep the source.
READS_LATER = ("mps",)
ALIGNMENT = 16  # bytes; a tensor begins at a multiple, so that any dtype can be read there

Value = TypeVar("Value")


def on_device(value: Value, device: torch.device) -> Value:
    """Copy all tensors in a value to the device, in one piece.

    The copy to a CUDA device starts from pinned memory: the host goes on at once, and the stream keeps the order. Out
    of ordinary memory each copy would wait until the device has nothing left to do.

    Args:
        value: a tensor of the CPU, or a dataclass, tuple or list that holds such tensors at any depth.
    """
    if device.type == "cpu":
        return value
    tensors = {id(tensor): tensor for tensor in _tensors(value)}
    copies = _copied(list(tensors.values()), device)
    moved: Value = _with(value, dict(zip(tensors, copies, strict=True)))
    return moved


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _with(value: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copies[id(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{entry.name: _with(getattr(value, entry.name), copies) for entry in fields(value)})
    if isinstance(value, tuple | list):
        return type(value)(_with(part, copies) for part in value)
    return value


def _copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    pieces = []
    for tensor in tensors:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        pieces += [data, data.new_zeros(-len(data) % ALIGNMENT)]
    buffer = torch.cat(pieces)
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    there, at, copies = buffer.to(device, non_blocking=device.type not in READS_LATER), 0, []
    for tensor, data in zip(tensors, pieces[::2], strict=True):
        copies.append(there[at : at + len(data)].view(tensor.dtype).view(tensor.shape))
        at += len(data) + -len(data) % ALIGNMENT
    return copies
