"""QLoRA: a 4-bit base with LoRA adapters on one card, so that the adapters learn, resume and export.

`qlora()` gives quantization, adapters and configuration as plain Hugging Face objects. GRPOPlusTrainer then refuses
what cannot work, keeps the dtype of the adapters, and logs the settings with hints. `save_merged` exports the trained
model without bitsandbytes. `load_trained` reads adapters back from the disk.

To add a recipe, write a function in `recipe.py`. To add a hint, write a function in `settings.py` and put it into
HINTS.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Export": "export",
    "FrozenAdapterCallback": "frozen",
    "QLoRA": "recipe",
    "load_trained": "reloaded",
    "qlora": "recipe",
    "save_merged": "export",
    "setting_check": "settings",
}

__all__ = ["Export", "FrozenAdapterCallback", "QLoRA", "load_trained", "qlora", "save_merged", "setting_check"]

if TYPE_CHECKING:
    from grpo_plus.qlora.export import Export, save_merged
    from grpo_plus.qlora.frozen import FrozenAdapterCallback
    from grpo_plus.qlora.recipe import QLoRA, qlora
    from grpo_plus.qlora.reloaded import load_trained
    from grpo_plus.qlora.settings import setting_check


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"grpo_plus.qlora.{_HOMES[name]}"), name)
