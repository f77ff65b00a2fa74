"""Which of PEFT's LoRA layers are a frozen linear layer plus one plain adapter, and why another layer is not."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.kernels.lora_linear import Adapted, Base


class OurForward(partial):
    """A `forward` of ours on an instance. A class of its own, so that `unfit` can tell it from somebody else's."""


def lora_layers(model: nn.Module) -> Iterator[Any]:
    """Every LoRA layer of a model, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def unfit(layer: Any) -> str | None:
    """Reason why a LoRA layer is now more than a frozen linear layer plus one plain adapter. None if it is not."""
    base = layer.base_layer
    forward = vars(layer).get("forward")
    if forward is not None and not isinstance(forward, OurForward):
        return "their forward has been replaced by another"
    if not _is_plain_linear(layer, base):
        return f"{type(layer).__name__} over {type(base).__name__} is no linear layer that is known here"
    weight, bias = base.weight, base.bias
    # Another kind of weight brings products of its own, as torchao's NF4Tensor does. A plain torch.mm would miss them.
    if type(base) is nn.Linear and type(weight) is not nn.Parameter:
        return f"the weight of the base is a {type(weight).__name__}"
    adapters = layer.lora_A
    names = [name for name in layer.active_adapters if name in adapters]
    if len(names) != 1:
        return f"{len(names)} adapters are active"
    name = names[0]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is no plain LoRA"
    if getattr(layer.lora_dropout[name], "p", 0.0) > 0:
        return f"lora_dropout is {layer.lora_dropout[name].p}"
    a, b = adapters[name], layer.lora_B[name]
    if b.bias is not None:
        return "the adapters have biases (lora_bias)"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "weights or biases of the base train"
    if weight.device.type == "meta" or _is_hooked(base) or _is_hooked(a) or _is_hooked(b):
        return "parts of it are offloaded or have hooks"
    return None


def adapted(layer: Any) -> Adapted:
    """The frozen layer and its active adapter, of a layer without an `unfit` reason."""
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    base = layer.base_layer
    return Adapted(
        Base(base, partial(_dense, base)), layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    )


def _is_plain_linear(layer: Any, base: Any) -> bool:
    kind = type(layer)
    if not kind.__module__.startswith("peft.tuners.lora.") or getattr(layer, "fan_in_fan_out", False):
        return False
    if kind.__name__ == "Linear":
        return type(base) is nn.Linear
    return kind.__name__ == "Linear4bit" and type(base).__name__ == "Linear4bit" and type(base) is _linear_4bit()


def _linear_4bit() -> type[nn.Module]:
    from bitsandbytes.nn import Linear4bit

    return Linear4bit


def _is_hooked(module: Any) -> bool:
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _dense(base: Any, dtype: torch.dtype) -> Tensor:
    if type(base) is nn.Linear:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(base.compute_dtype or dtype)
