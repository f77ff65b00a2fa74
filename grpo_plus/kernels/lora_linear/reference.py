"""The specification: a frozen linear layer plus a low-rank one, and autograd."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Base(NamedTuple):
    """A frozen linear layer, quantized or not.

    project: (..., in) -> (..., out), its bias included, into memory of its own.
    dense: dtype of the output -> the weight (out, in), dequantized, in the dtype of its product.
    """

    project: Callable[[Tensor], Tensor]
    dense: Callable[[torch.dtype], Tensor]


def lora_linear(x: Tensor, base: Base, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Output (..., out) of a layer with an adapter.

    y = W x + bias + scaling * B (A x), in the dtype of the base's output

    The adapter's products are in autocast's dtype, else in that of its weights.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (https://huggingface.co/papers/2106.09685), Eq. 3.

    Args:
        x: (..., in).
        a: (r, in).
        b: (out, r).
        scaling: alpha / r, or whatever else the adapter was made with (rsLoRA: alpha / √r).
    """
    output = base.project(x)
    return (output + scaling * F.linear(F.linear(x.to(a.dtype), a), b)).to(output.dtype)
