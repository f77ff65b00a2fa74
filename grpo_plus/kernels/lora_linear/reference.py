"""Specification of a layer with an adapter: a frozen linear layer plus a low-rank layer, and autograd."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Base(NamedTuple):
    """A frozen linear layer, quantized or not.

    project: (..., in) -> (..., out), bias included, into fresh memory.
    dense: dtype of the output -> the dequantized weight (out, in), in the dtype of the weight's product.
    """

    project: Callable[[Tensor], Tensor]
    dense: Callable[[torch.dtype], Tensor]


def lora_linear(x: Tensor, base: Base, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Output (..., out) of a layer with an adapter.

        y = x Wᵀ + bias + scaling * (x aᵀ) bᵀ, in the dtype of the base's output

    The adapter's products are in autocast's dtype where autocast is on, else in the dtype of the adapter's weights.
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (https://huggingface.co/papers/2106.09685), Eq. 3.

    Args:
        x: (..., in).
        a: (r, in).
        b: (out, r).
        scaling: alpha / r, or another factor that the adapter was made with (rsLoRA: alpha / √r).
    """
    output = base.project(x)
    return (output + scaling * F.linear(F.linear(x.to(a.dtype), a), b)).to(output.dtype)
