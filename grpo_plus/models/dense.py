"""4-bit layers whose weights are dequantized once for several products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class DenseForward:
    """A `forward` of bitsandbytes' Linear4bit with its weight (out, in) at hand: the same numbers, the same dtypes."""

    def __init__(self, layer: Any) -> None:
        weight = dequantized(layer)
        self.layer, self.weight = layer, weight.to(layer.compute_dtype or weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Output (..., out) in the dtype of x."""
        layer, dtype = self.layer, x.dtype
        if not layer.compute_type_is_set:
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        x = x.to(layer.compute_dtype or dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias).to(dtype)


@contextmanager
def dense_weights(module: nn.Module) -> Iterator[None]:
    """Keep the weights of the module's 4-bit layers dequantized, inside."""
    # PEFT's layer around one has the same name, but is no nn.Linear.
    layers: list[Any] = [
        part for part in module.modules() if type(part).__name__ == "Linear4bit" and isinstance(part, nn.Linear)
    ]
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = DenseForward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def dense_of(layer: nn.Module) -> Tensor | None:
    """Dequantized weight of a layer that `dense_weights` keeps. None outside of it."""
    forward = vars(layer).get("forward")
    return forward.weight if isinstance(forward, DenseForward) else None


def dequantized(layer: Any) -> Tensor:
    """Weight (out, in) of a 4-bit layer, in the dtype that it was quantized from."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
