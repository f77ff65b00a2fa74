"""QLoRA: a 4-bit base with LoRA adapters on one card, so that the adapters learn, resume and export.

    recipe.py       quantization, LoRA and configuration as plain Hugging Face objects
    checks.py       what cannot work, refused before anything is loaded
    precision.py    the dtype of the adapters, after construction and after a checkpoint
    lora_layers.py  the adapters' layers without PEFT's copies, while a training lasts
    frozen.py       a callback that stops a run whose adapters do not move
    settings.py     one screen about the run at its start, with hints
    export.py       the trained model without bitsandbytes, checked against the one that was trained

To add a hint, write a function in `settings.py` and put it into HINTS; to add a recipe, a function in `recipe.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Export": "export",
    "FrozenAdapterCallback": "frozen",
    "QLoRA": "recipe",
    "qlora": "recipe",
    "save_merged": "export",
    "setting_check": "settings",
}

__all__ = ["Export", "FrozenAdapterCallback", "QLoRA", "qlora", "save_merged", "setting_check"]

if TYPE_CHECKING:
    from grpo_plus.qlora.export import Export, save_merged
    from grpo_plus.qlora.frozen import FrozenAdapterCallback
    from grpo_plus.qlora.recipe import QLoRA, qlora
    from grpo_plus.qlora.settings import setting_check


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"grpo_plus.qlora.{_HOMES[name]}"), name)
