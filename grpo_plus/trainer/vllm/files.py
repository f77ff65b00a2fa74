"""The adapter on the disk, a version for each time that vLLM is sent it."""

import secrets
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from grpo_plus.qlora.checks import ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Adapter:
    """One version of the adapter.

    Attributes:
        name: unique to the run and the version. vLLM keeps adapters and cached prompts by name.
        version: 1 or more, larger each time.
        path: the folder with PEFT's two files.
    """

    name: str
    version: int
    path: str


class AdapterFiles:
    """Writes the active adapter of a model, and keeps the newest version alone.

    The folder is this object's own, and is gone when the object is, or the process.

    Args:
        folder: the beginning of its name.
        writes: whether this process writes. The others have no more to do than to gather what is spread.
        device: where spread weights are gathered.
    """

    def __init__(self, model: Any, folder: Path, *, writes: bool, device: torch.device) -> None:
        self._model = model
        self._writes = writes
        self._device = device
        self._run = secrets.token_hex(4)  # a server may still hold the adapters of an earlier run
        self._version = 0
        for left in folder.parent.glob(f"{folder.name}-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        # An earlier trainer of this process may be collected, with its folder, while this one trains.
        self._folder = folder.with_name(f"{folder.name}-{self._run}")
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def write(self) -> Adapter | None:
        """Write the adapter as it is. All processes must call it. None where this one does not write."""
        (active,) = self._model.active_adapters
        weights = get_peft_model_state_dict(self._model, adapter_name=active, save_embedding_layers=False)
        whole = {key: self._whole(value) for key, value in weights.items()}
        if not self._writes:
            return None
        self._version += 1
        name = f"grpo_plus-{self._run}-v{self._version}"
        unfinished, path = self._folder / f".{name}", self._folder / name
        unfinished.mkdir(parents=True)
        save_file(whole, unfinished / ADAPTER_WEIGHTS)
        self._model.peft_config[active].save_pretrained(unfinished)
        unfinished.rename(path)  # whole files alone have the name that vLLM is told
        return Adapter(name, self._version, str(path))

    def _whole(self, weight: Tensor) -> Tensor:
        weight = weight.detach()
        if isinstance(weight, DTensor):  # FSDP2, whose weights may wait on the host
            spread: Any = weight.to(self._device)
            weight = spread.full_tensor()
        return weight.cpu().contiguous()

    def keep_only(self, adapter: Adapter) -> None:
        """Remove the other versions, which no request names any more."""
        for path in self._folder.iterdir():
            if path.name != adapter.name:
                shutil.rmtree(path)
