"""Compute PEFT's LoRA layers by `kernels.lora_linear` while a training lasts. The modules stay what and where they are.

Only `forward` of the instances is replaced. At every call, the new forward asks whether PEFT's own forward would do
anything but add one plain adapter, and if so calls PEFT's own. That is the case with adapters disabled or merged, with
another set of adapters, and with a hook or a dropout. Generation token by token takes PEFT's own forward too. State
dicts, `disable_adapter`, `set_adapter`, merging, saving and loading see nothing of the replacement.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.kernels.lora_linear import Base, lora_linear
from grpo_plus.models.adapters import has_adapters


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Compute, inside, every LoRA layer of the model by `kernels.lora_linear`, except those with an `unfit` reason."""
    fused = [layer for layer in _layers(model) if "forward" not in vars(layer) and unfit(layer) is None]
    for layer in fused:
        # A partial and no bound method, so that copies and pickles of the layer call it on themselves.
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in fused:
            if _is_ours(vars(layer).get("forward")):
                del layer.forward


def has_lora(model: Any) -> bool:
    """Whether the model is a PEFT model with a LoRA layer."""
    return has_adapters(model) and any(True for _ in _layers(model))


def why_not_fused(model: Any) -> list[str]:
    """Reasons why layers of the model stay on PEFT's own forward, each once. Empty where all layers can be fused."""
    if not has_adapters(model):
        return ["the model has no adapters"]
    if not has_lora(model):
        return ["the model has no LoRA layers"]
    return list(dict.fromkeys(reason for layer in _layers(model) if (reason := unfit(layer))))


def fits_any(model: Any) -> bool:
    """Whether the model has a layer to fuse."""
    return has_adapters(model) and any(unfit(layer) is None for layer in _layers(model))


def unfit(layer: Any) -> str | None:
    """Reason why a LoRA layer is now more than a frozen linear layer plus one plain adapter. None if it is not."""
    base = layer.base_layer
    if "forward" in vars(layer) and not _is_ours(layer.forward):
        return "their forward has been replaced by another"
    if not _is_plain_linear(layer, base):
        return f"{type(layer).__name__} over {type(base).__name__} is no linear layer that is known here"
    # Another kind of weight brings products of its own, as torchao's NF4Tensor does. A plain torch.mm would miss them.
    if type(base) is nn.Linear and type(base.weight) is not nn.Parameter:
        return f"the weight of the base is a {type(base.weight).__name__}"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return f"{len(names)} adapters are active"
    name = names[0]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is no plain LoRA"
    if getattr(layer.lora_dropout[name], "p", 0.0) > 0:
        return f"lora_dropout is {layer.lora_dropout[name].p}"
    if layer.lora_B[name].bias is not None:
        return "the adapters have biases (lora_bias)"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "weights or biases of the base train"
    if base.weight.device.type == "meta" or any(map(_is_hooked, (base, layer.lora_A[name], layer.lora_B[name]))):
        return "parts of it are offloaded or have hooks"
    return None


def _layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _is_plain_linear(layer: Any, base: Any) -> bool:
    kinds = {"Linear": nn.Linear} | ({"Linear4bit": _linear_4bit()} if type(base).__name__ == "Linear4bit" else {})
    return (
        type(layer).__module__.startswith("peft.tuners.lora.")
        and type(base) is kinds.get(type(layer).__name__)
        and not getattr(layer, "fan_in_fan_out", False)
    )


def _linear_4bit() -> type[nn.Module]:
    from bitsandbytes.nn import Linear4bit

    return Linear4bit


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func is _forward


def _is_hooked(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if _generates(x) or args or kwargs or layer.disable_adapters or layer.merged or unfit(layer) or _mixes(layer, x):
        return type(layer).forward(layer, x, *args, **kwargs)
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    base = Base(layer.base_layer, partial(_dense, layer.base_layer))
    return lora_linear(x, base, layer.lora_A[name].weight, layer.lora_B[name].weight, scaling=layer.scaling[name])


def _generates(x: Tensor) -> bool:
    """Whether x is one token per row without a graph. Further questions would take longer than PEFT's copies."""
    return not torch.is_grad_enabled() and x.dim() == 3 and x.shape[1] == 1


def _mixes(layer: Any, x: Tensor) -> bool:
    """Whether autocast's dtype and the dtype of a quantized layer's output would widen each other: fp16 and bf16."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or type(layer.base_layer) is nn.Linear:
        return False
    cast = torch.get_autocast_dtype(kind)
    if torch.promote_types(x.dtype, cast) == x.dtype:
        return False
    # Python shows the warning once. It cannot come earlier, because only a forward knows the dtype of the hidden
    # states.
    warnings.warn(
        f"lora_backend: PEFT's own forward in a 4-bit layer. Autocast is in {cast}, its input in {x.dtype}; load the "
        "model in autocast's dtype.",
        stacklevel=1,
    )
    return True


def _dense(base: Any, dtype: torch.dtype) -> Tensor:
    if type(base) is nn.Linear:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(base.compute_dtype or dtype)
