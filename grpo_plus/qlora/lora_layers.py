"""Compute PEFT's LoRA layers by `kernels.lora_linear` while a training lasts. The modules stay what and where they are.

Only `forward` of the instances is replaced. At every call, the new forward asks whether PEFT's own forward would do
anything but add one plain adapter, and if so calls PEFT's own. That is the case with adapters disabled or merged, with
another set of adapters, and with a hook or a dropout. Within a hold (`adapter_products`) one look tells for all calls
whether the last answer still stands. Outside of a hold, generation token by token takes PEFT's own forward too. State
dicts, `disable_adapter`, `set_adapter`, merging, saving and loading see nothing of the replacement.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.kernels.lora_linear import Sharing, lora_linears
from grpo_plus.models.adapters import has_adapters
from grpo_plus.qlora.adapter_products import Products
from grpo_plus.qlora.plain_lora import OurForward, adapted, lora_layers, unfit


@contextmanager
def fused_lora(model: nn.Module, products: Products | None = None) -> Iterator[Products]:
    """Compute, inside, every LoRA layer of the model by `kernels.lora_linear`, except those with an `unfit` reason.

    Yields `products`, or new ones, whose holds make the layers cheaper for the host.
    """
    products = Products() if products is None else products
    fused = [layer for layer in lora_layers(model) if "forward" not in vars(layer) and unfit(layer) is None]
    for layer in fused:
        # No bound method, so that copies and pickles of the layer call it on themselves.
        layer.forward = OurForward(_forward, products, layer)
    try:
        with products.of(fused) if fused else nullcontext():
            yield products
    finally:
        for layer in fused:
            if isinstance(vars(layer).get("forward"), OurForward):
                del layer.forward


def has_lora(model: Any) -> bool:
    """Whether the model is a PEFT model with a LoRA layer."""
    return has_adapters(model) and any(True for _ in lora_layers(model))


def why_not_fused(model: Any) -> list[str]:
    """Reasons why layers of the model stay on PEFT's own forward, each once. Empty where all layers can be fused."""
    if not has_adapters(model):
        return ["the model has no adapters"]
    if not has_lora(model):
        return ["the model has no LoRA layers"]
    return list(dict.fromkeys(reason for layer in lora_layers(model) if (reason := unfit(layer))))


def fits_any(model: Any) -> bool:
    """Whether the model has a layer to fuse."""
    return has_adapters(model) and any(unfit(layer) is None for layer in lora_layers(model))


def _forward(products: Products, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    ours = products.on or not torch.is_grad_enabled()  # without a graph ours launch less in any case
    if ours and not (args or kwargs or layer.disable_adapters or layer.merged or _mixes(layer, x)):
        if products.is_held:
            output = products.output(layer, x)
            if output is not None:
                return output
        if not _generates(x) and not unfit(layer):
            return lora_linears(x, Sharing.of([adapted(layer)]))[0]
    return type(layer).forward(layer, x, *args, **kwargs)


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
