"""Adapters of a model: whether it has any, their weights, and the bits of the base beneath."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available

ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# PEFT's ways to start an adapter that subtract the start from the weights of the base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def has_adapters(model: Any) -> bool:
    """Whether the model is a PEFT model."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def bits_of(model: Any) -> int | None:
    """Bits of a base that bitsandbytes has quantized, 4 or 8. None for any other base."""
    if getattr(model, "is_loaded_in_4bit", False):
        return 4
    return 8 if getattr(model, "is_loaded_in_8bit", False) else None


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimizer trains, of a model with adapters."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def adapter_values(model: Any) -> dict[str, Tensor]:
    """Trainable weights of a model with adapters, as they are, for `restore_adapters`. Empty for other models."""
    return {name: weight.data for name, weight in adapter_parameters(model)} if has_adapters(model) else {}


def changed_by_init(peft_config: Any) -> str | None:
    """The `init_lora_weights` of a PEFT configuration that changes the base, as PiSSA does. None for the others."""
    init = getattr(peft_config, "init_lora_weights", None)
    return init if isinstance(init, str) and init.lower().startswith(CHANGES_BASE) else None
