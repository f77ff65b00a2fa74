"""Copies to the device: in one piece, and without waiting only where the source outlives the copy."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_plus.packing.transfer import on_device


class Copies(TorchDispatchMode):
    """Whether each copy to another device waits."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and "device" in (kwargs or {}):
            self.waits.append(not kwargs.get("non_blocking"))
        return func(*args, **(kwargs or {}))


def test_a_copy_out_of_ordinary_memory_waits():
    # MPS reads later what `on_device` frees when it returns. "meta" stands for any device but CUDA.
    value = torch.arange(3), [torch.arange(5, dtype=torch.int32), torch.zeros(0)]
    with Copies() as copies:
        moved = on_device(value, torch.device("meta"))
    assert copies.waits == [True]
    assert [(part.dtype, part.shape) for part in (moved[0], *moved[1])] == [
        (part.dtype, part.shape) for part in (value[0], *value[1])
    ]
