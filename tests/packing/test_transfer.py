"""Copies to the device: in one piece, and without waiting only where the source outlives the copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_plus.packing import transfer
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


@pytest.mark.parametrize("later", [True, False])
def test_a_copy_waits_where_the_device_would_read_later_what_is_freed_on_return(monkeypatch, later):
    assert "mps" in transfer.READS_LATER
    monkeypatch.setattr(transfer, "READS_LATER", ("meta",) if later else ())
    value = torch.arange(3), [torch.arange(5, dtype=torch.int32), torch.zeros(0)]
    with Copies() as copies:
        moved = on_device(value, torch.device("meta"))
    assert copies.waits == [later]
    assert [(part.dtype, part.shape) for part in (moved[0], *moved[1])] == [
        (part.dtype, part.shape) for part in (value[0], *value[1])
    ]
