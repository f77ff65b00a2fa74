"""Linear layers with adapters as one step of autograd: each product is added into the buffer of the one before.

    y = project(x);           small = x @ a.T;           y += scaling * small @ b.T
    grad_x = grad_y @ W;      grad_small = scaling * grad_y @ b;      grad_x += grad_small @ a
    grad_a = grad_small.T @ x;                           grad_b = scaling * grad_y.T @ small

PEFT writes the same as five modules. They make a clone of y (4-bit), the adapter's output, its scaled copy, its rounded
copy and the sum, all (N, out), and as many in backward. Here each product is added into what is there. Between forward
and backward only x and the (N, r) `small` live. Under autocast, x is kept as autocast has rounded it. A quantized
weight is dequantized once per product that needs it.

Layers that share an input, as q, k and v do, are one step: their a lie one below the other, so `small` and grad_a are
one product each, and every grad_x is added into the same buffer. On a GPU the host starts 18 products forward and 33
backward for the seven layers of a decoder layer. PEFT starts 63 and 80.

No Triton: what is left are products of the vendor's library, whose epilogue does the adding. A kernel that dequantizes
inside the product would save a write and a read of W, 4 bytes per weight next to 2 operations per weight and token. On
paper, at 165 TFLOP/s and 1 TB/s, that is 4 % of the product's time for 8192 tokens and 16 % for 2048. The kernel would
gain that only if its product came closer than that to the library's speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_plus.kernels.lora_linear.reference import Base
from grpo_plus.kernels.products import compute_dtype


class Adapted(NamedTuple):
    """A frozen linear layer and its adapter: the arguments of `reference.lora_linear` without x."""

    base: Base
    a: Tensor
    b: Tensor
    scaling: float


class Copies(NamedTuple):
    """The adapters of layers that share an input, in the dtype of their products.

    a: (R, in), all a one below the other; R is the sum of the ranks.
    b: each (out, r), in the same order.
    """

    a: Tensor
    b: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Sharing:
    """Layers that share an input, with what a call would otherwise ask for every time.

    Attributes:
        layers: their adapters are in one dtype, on one device.
        weights: a and b of each layer in turn.
        ranks: of each layer; R is their sum.
        counts: elements of all a together, and of each b.
    """

    layers: tuple[Adapted, ...]
    weights: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, layers: Sequence[Adapted]) -> "Sharing":
        """Put the layers together."""
        weights = tuple(chain.from_iterable((layer.a, layer.b) for layer in layers))
        counts = (sum(layer.a.numel() for layer in layers), *(layer.b.numel() for layer in layers))
        return cls(tuple(layers), weights, tuple(layer.a.shape[0] for layer in layers), counts)


def lora_linear(x: Tensor, base: Base, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Compute `reference.lora_linear`, in its dtypes. Only x, a and b get gradients."""
    return lora_linears(x, Sharing.of([Adapted(base, a, b, scaling)]))[0]


def lora_linears(x: Tensor, sharing: Sharing, copies: Copies | None = None) -> tuple[Tensor, ...]:
    """Compute `reference.lora_linear` of each layer on the same x.

    Args:
        copies: of the adapters as they are now. Backward uses the same tensors. None: copied here and in backward.
    """
    if torch.is_grad_enabled():
        return _LoraLinears.apply(x, sharing, copies, *sharing.weights)
    return _forward(x, sharing, copies)[0]


def _copies(weights: Sequence[Tensor], dtype: torch.dtype) -> Copies:
    all_a = weights[0] if len(weights) == 2 else torch.cat(list(weights[::2]))
    return Copies(all_a.to(dtype), tuple(b.to(dtype) for b in weights[1::2]))


def _rows(states: Tensor) -> Tensor:
    return states if states.dim() == 2 else states.reshape(-1, states.shape[-1])


def _forward(x: Tensor, sharing: Sharing, copies: Copies | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Outputs (..., out), the input (N, in) as the adapters read it, and `small` (N, R)."""
    dtype = compute_dtype(sharing.weights[0])
    rows = _rows(x).to(dtype)
    a, all_b = copies or _copies(sharing.weights, dtype)
    small = torch.mm(rows, a.t())
    outputs = []
    for layer, b, part in zip(sharing.layers, all_b, small.split(sharing.ranks, 1), strict=True):
        output = layer.base.project(x)
        _add_product(_rows(output), part, b.t(), layer.scaling)
        outputs.append(output)
    return tuple(outputs), rows, small


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(torch.mm(left, right), alpha=scale)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sharing: Sharing, copies: Copies | None, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs, rows, small = _forward(x, sharing, copies)
        ctx.sharing, ctx.copied, ctx.x_shape, ctx.x_dtype = sharing, copies is not None, x.shape, x.dtype
        # Other layers may keep the same x, unless the adapters' own copy is narrower.
        kept = rows if rows.element_size() < x.element_size() else x
        needs_x = any(ctx.needs_input_grad[3::2])
        ctx.save_for_backward(kept if needs_x else None, small, *((copies.a, *copies.b) if copies else weights))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, small, *weights = ctx.saved_tensors
        device = small.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _backward(ctx, grads, x, small, weights)
        return _backward(ctx, grads, x, small, weights)


def _backward(
    ctx: Any, grads: tuple[Tensor | None, ...], x: Tensor | None, small: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * len(ctx.needs_input_grad)
    sharing, needed = ctx.sharing, ctx.needs_input_grad
    # From the saved tensors and not from the layers' own: autograd has made sure that nobody has changed them.
    copies = Copies(weights[0], tuple(weights[1:])) if ctx.copied else _copies(weights, small.dtype)
    rows = [None if grad is None else _rows(grad) for grad in grads]
    flat = small.new_empty(sum(sharing.counts))  # all weights' gradients, which change their dtype in one copy
    of_a, *of_b = flat.split(sharing.counts)
    grad_small = _small_and_b_grads(rows, small, sharing, copies.b, of_b)
    if x is not None:
        torch.mm(grad_small.t(), _rows(x).to(small.dtype), out=of_a.view(len(copies.a), -1))
    dtype = sharing.weights[0].dtype
    if flat.dtype != dtype:
        of_a, *of_b = flat.to(dtype).split(sharing.counts)
    of_weights: list[Tensor | None] = [None] * len(sharing.weights)
    for index, part in enumerate(of_a.view(len(copies.a), -1).split(sharing.ranks)):
        # PEFT leaves the adapter of an output that nobody has used without a gradient.
        if grads[index] is not None:
            a, b = 2 * index, 2 * index + 1
            of_weights[a] = part if needed[3 + a] else None
            of_weights[b] = (
                of_b[index].view_as(sharing.weights[b]).to(sharing.weights[b].dtype) if needed[3 + b] else None
            )
    return _input_grad(ctx, rows, grad_small, copies.a) if needed[0] else None, None, None, *of_weights


def _small_and_b_grads(
    grads: list[Tensor | None], small: Tensor, sharing: Sharing, all_b: tuple[Tensor, ...], of_b: list[Tensor]
) -> Tensor:
    """Gradient of `small` (N, R). The gradients of b are written to `of_b`."""
    grad_small = torch.empty_like(small)
    parts = zip(small.split(sharing.ranks, 1), grad_small.split(sharing.ranks, 1), strict=True)
    for grad, layer, b, of, (part, of_part) in zip(grads, sharing.layers, all_b, of_b, parts, strict=True):
        if grad is None:
            of_part.zero_()
            continue
        grad = grad.to(small.dtype)  # a copy where the adapter is wider than its layer
        # With beta=0, addmm_ ignores what was there: a scaled product in one rounding and one launch.
        of_part.addmm_(grad, b, beta=0, alpha=layer.scaling)
        of.view_as(b).addmm_(grad.t(), part, beta=0, alpha=layer.scaling)
    return grad_small


def _input_grad(ctx: Any, grads: list[Tensor | None], grad_small: Tensor, a: Tensor) -> Tensor:
    total = None
    for grad, layer in zip(grads, ctx.sharing.layers, strict=True):
        if grad is None:
            continue
        weight = layer.base.dense(grad.dtype)
        if total is None:
            total = torch.mm(grad.to(weight.dtype), weight).to(ctx.x_dtype)
        else:
            _add_product(total, grad.to(weight.dtype), weight)
        del weight  # before the next one is dequantized
    assert total is not None  # backward returns before, where no output has a gradient
    _add_product(total, grad_small, a)
    return total.view(ctx.x_shape)
