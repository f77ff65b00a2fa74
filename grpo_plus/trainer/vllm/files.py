"""The adapter on the disk, a version for each time that vLLM is sent it."""

import secrets
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file

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

    The folder is this process's own, and is gone when the process ends.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._run = secrets.token_hex(4)  # a server may still hold the adapters of an earlier run
        self._version = 0
        shutil.rmtree(folder, ignore_errors=True)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def write(self) -> Adapter:
        """Write the adapter as it is. It appears under its name when its files are whole."""
        self._version += 1
        name = f"grpo_plus-{self._run}-v{self._version}"
        unfinished, path = self._folder / f".{name}", self._folder / name
        unfinished.mkdir(parents=True)
        (active,) = self._model.active_adapters
        weights = get_peft_model_state_dict(self._model, adapter_name=active, save_embedding_layers=False)
        on_host = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(on_host, unfinished / ADAPTER_WEIGHTS)
        self._model.peft_config[active].save_pretrained(unfinished)
        unfinished.rename(path)
        return Adapter(name, self._version, str(path))

    def keep_only(self, adapter: Adapter) -> None:
        """Remove the other versions, which no request names any more."""
        for path in self._folder.iterdir():
            if path.name != adapter.name:
                shutil.rmtree(path)
