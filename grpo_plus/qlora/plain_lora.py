"""Which of PEFT's LoRA layers are a frozen linear layer plus one plain adapter, and why another layer is not."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.kernels.lora_linear import Adapted, Base
from grpo_plus.models.dense import DenseForward, dense_of, dequantized


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


class Judged:
    """The answers of `unfit` and `adapted` for a layer, and whether they still hold, at a tenth of the time.

    Attributes:
        part: the frozen layer and its adapter. None for an unfit layer.
        active: what the layer calls its active adapter.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.part = adapted(layer) if unfit(layer) is None else None
        self.active = layer.active_adapter
        if self.part is None:
            return
        self._name = next(name for name in layer.active_adapters if name in layer.lora_A)
        self._names = list(layer.active_adapters)
        self._base = layer.base_layer
        self._weights = self._base.weight, self._base.bias
        self._adapters = layer.lora_A[self._name], layer.lora_B[self._name]
        # Dictionaries of the modules, which are asked without the way through `nn.Module.__getattr__`.
        self._own, self._of_base = vars(layer), vars(self._base)
        self._of_a, self._of_b = map(vars, self._adapters)
        self._hooks = [own[kind] for own in (self._of_base, self._of_a, self._of_b) for kind in _HOOKS]
        self._forward = self._own.get("forward")

    def holds(self) -> bool:
        """Whether the answers would be the same again."""
        part, own, name = self.part, self._own, self._name
        if part is None:
            return False
        modules, base = own["_modules"], self._of_base["_parameters"]
        weight, bias = self._weights
        return (
            self.layer.active_adapters == self._names
            and own.get("forward") is self._forward
            and modules["base_layer"] is self._base
            and (modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)) == self._adapters
            and self._of_a["_parameters"]["weight"] is part.a
            and self._of_b["_parameters"]["weight"] is part.b
            and self._of_b["_parameters"]["bias"] is None
            and base["weight"] is weight
            and base["bias"] is bias
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not any(self._hooks)
            and not any(map(_has_other_forward, (self._of_base, self._of_a, self._of_b)))
            and own["scaling"].get(name) == part.scaling
            and name not in own["lora_variant"]
            and vars(modules["lora_dropout"]._modules[name]).get("p", 0.0) == 0.0
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    return _has_other_forward(own) or any(own[kind] for kind in _HOOKS)


def _has_other_forward(own: dict[str, Any]) -> bool:
    """Whether an instance, by its dictionary, has a forward that computes something else than its class's."""
    return "forward" in own and not isinstance(own["forward"], DenseForward)


def _dense(base: Any, dtype: torch.dtype) -> Tensor:
    if type(base) is nn.Linear:
        return base.weight.to(dtype)
    kept = dense_of(base)
    return (dequantized(base) if kept is None else kept).to(base.compute_dtype or dtype)
