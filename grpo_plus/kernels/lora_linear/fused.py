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
backward for the seven layers of a decoder layer. PEFT starts 56 and 102.

No Triton: what is left are products of the vendor's library, whose epilogue does the adding. A kernel that dequantizes
inside the product would save a write and a read of W, 4 bytes per weight next to 2 operations per weight and token. On
paper, at 165 TFLOP/s and 1 TB/s, that is 4 % of the product's time for 8192 tokens and 16 % for 2048. The kernel would
gain that only if its product came closer than that to the library's speed.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
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


def lora_linear(x: Tensor, base: Base, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Compute `reference.lora_linear`, in its dtypes. Only x, a and b get gradients."""
    return lora_linears(x, (Adapted(base, a, b, scaling),))[0]


def lora_linears(x: Tensor, layers: Sequence[Adapted], copies: Copies | None = None) -> tuple[Tensor, ...]:
    """Compute `reference.lora_linear` of each layer on the same x.

    Args:
        layers: their adapters are in one dtype, on one device.
        copies: of the adapters as they are now. Backward uses the same tensors. None: copied here and in backward.
    """
    if torch.is_grad_enabled():
        weights = chain.from_iterable((layer.a, layer.b) for layer in layers)
        return _LoraLinears.apply(x, layers, copies, *weights)
    return _forward(x, layers, copies)[0]


def _copies(layers: Sequence[Adapted], dtype: torch.dtype) -> Copies:
    all_a = layers[0].a if len(layers) == 1 else torch.cat([layer.a for layer in layers])
    return Copies(all_a.to(dtype), tuple(layer.b.to(dtype) for layer in layers))


def _slices(layers: Sequence[Adapted]) -> list[slice]:
    """The place of each layer among the R ranks."""
    ends = list(accumulate(len(layer.a) for layer in layers))
    return [slice(end - len(layer.a), end) for layer, end in zip(layers, ends, strict=True)]


def _forward(x: Tensor, layers: Sequence[Adapted], copies: Copies | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Outputs (..., out), the input (N, in) as the adapters read it, and `small` (N, R)."""
    dtype = compute_dtype(layers[0].a)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    a, all_b = copies or _copies(layers, dtype)
    small = torch.mm(rows, a.t())
    outputs = []
    for layer, b, place in zip(layers, all_b, _slices(layers), strict=True):
        output = layer.base.project(x)
        _add_product(output.view(-1, output.shape[-1]), small[:, place], b.t(), layer.scaling)
        outputs.append(output)
    return tuple(outputs), rows, small


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(torch.mm(left, right), alpha=scale)


def _set_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Scaled product, in one rounding and one launch. With beta=0, addmm_ ignores what `out` held."""
    out.addmm_(left, right, beta=0, alpha=scale)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Adapted], copies: Copies | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, rows, small = _forward(x, layers, copies)
        ctx.layers, ctx.copied, ctx.x_shape, ctx.x_dtype = layers, copies is not None, x.shape, x.dtype
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
        if all(grad is None for grad in grads):
            return (None,) * (3 + 2 * len(ctx.layers))
        rows = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        with torch.autocast(small.device.type, enabled=False):
            if ctx.copied:
                layers, copies = ctx.layers, Copies(weights[0], tuple(weights[1:]))
            else:
                # The saved tensors and not the layers' own: autograd has made sure that nobody has changed them.
                pairs = zip(ctx.layers, weights[::2], weights[1::2], strict=True)
                layers = [Adapted(layer.base, a, b, layer.scaling) for layer, a, b in pairs]
                copies = _copies(layers, small.dtype)
            grad_small, of_weights = _adapter_grads(rows, x, small, layers, copies.b, ctx.needs_input_grad[3:])
            grad_x = _input_grad(ctx, rows, grad_small, copies.a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *of_weights


def _adapter_grads(
    grads: list[Tensor | None],
    x: Tensor | None,
    small: Tensor,
    layers: Sequence[Adapted],
    all_b: tuple[Tensor, ...],
    needed: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of `small` (N, R), and of every a and b: a, b, a, b ... All of them change their dtype in one copy."""
    width, places = layers[0].a.shape[1], _slices(layers)
    counts = [small.shape[1] * width if x is not None else 0]
    counts += [layer.b.numel() if needs else 0 for layer, needs in zip(layers, needed[1::2], strict=True)]
    grad_small, flat = torch.empty_like(small), small.new_empty(sum(counts))
    of_a, *of_b = flat.split(counts)
    for grad, layer, b, place, of in zip(grads, layers, all_b, places, of_b, strict=True):
        if grad is None:
            grad_small[:, place].zero_()
            continue
        grad = grad.to(small.dtype)  # a copy where the adapter is wider than its layer
        _set_product(grad_small[:, place], grad, b, layer.scaling)
        if of.numel():
            _set_product(of.view(layer.b.shape), grad.t(), small[:, place], layer.scaling)
    if x is not None:
        torch.mm(grad_small.t(), x.reshape(-1, width).to(small.dtype), out=of_a.view(-1, width))
    of_a, *of_b = flat.to(layers[0].a.dtype).split(counts)
    found: list[Tensor | None] = []
    for grad, layer, place, of, (a_needs, b_needs) in zip(
        grads, layers, places, of_b, zip(needed[::2], needed[1::2], strict=True), strict=True
    ):
        # PEFT leaves the adapter of an output that nobody has used without a gradient.
        found.append(of_a.view(-1, width)[place] if a_needs and grad is not None else None)
        found.append(of.view(layer.b.shape).to(layer.b.dtype) if b_needs and grad is not None else None)
    return grad_small, found


def _input_grad(ctx: Any, grads: list[Tensor | None], grad_small: Tensor, a: Tensor) -> Tensor:
    total = None
    for grad, layer in zip(grads, ctx.layers, strict=True):
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
