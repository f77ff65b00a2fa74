"""Linear layer with an adapter as one step of autograd: each product is added into the buffer of the one before.

    y = project(x);           small = x @ a.T;           y += scaling * small @ b.T
    grad_x = grad_y @ W;      grad_small = scaling * grad_y @ b;      grad_x += grad_small @ a
    grad_a = grad_small.T @ x;                           grad_b = scaling * grad_y.T @ small

PEFT writes the same as five modules. They make a clone of y (4-bit), the adapter's output, its scaled copy, its rounded
copy and the sum, all (N, out), and as many in backward. Here each product is added into what is there. Between forward
and backward only x and the (N, r) `small` live. Layers that share an input share one x. Under autocast, x is kept as
autocast has rounded it. A quantized weight is dequantized once per product that needs it.

No Triton: what is left are products of the vendor's library, whose epilogue does the adding. A kernel that dequantizes
inside the product would save a write and a read of W, 4 bytes per weight next to 2 operations per weight and token. On
paper, at 165 TFLOP/s and 1 TB/s, that is 4 % of the product's time for 8192 tokens and 16 % for 2048. The kernel would
gain that only if its product came closer than that to the library's speed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_plus.kernels.lora_linear.reference import Base
from grpo_plus.kernels.products import compute_dtype


def lora_linear(x: Tensor, base: Base, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Compute `reference.lora_linear`, in its dtypes. Only x, a and b get gradients."""
    if torch.is_grad_enabled():
        return _LoraLinear.apply(x, a, b, base, scaling)
    return _forward(x, a, b, base, scaling)[0]


def _forward(x: Tensor, a: Tensor, b: Tensor, base: Base, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output (..., out), the input (N, in) as the adapter reads it, and `small` (N, r)."""
    output = base.project(x)
    dtype = compute_dtype(a)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    small = torch.mm(rows, a.to(dtype).t())
    _add_product(output.view(-1, output.shape[-1]), small, b.to(dtype).t(), scaling)
    return output, rows, small


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(torch.mm(left, right), alpha=scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: Base, scaling: float) -> Tensor:
        output, rows, small = _forward(x, a, b, base, scaling)
        ctx.base, ctx.scaling, ctx.x_dtype = base, scaling, x.dtype
        # Layers that share an input share the saved x, unless the adapter's own copy is narrower.
        kept = rows if rows.element_size() < x.element_size() else x
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, small, a, b)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, small, a, b = ctx.saved_tensors
        shape, dtype = (*grad_y.shape[:-1], a.shape[1]), small.dtype
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad_y.device.type, enabled=False):
            grad = grad_y.to(dtype)  # a copy where the adapter is wider than its layer
            grad_small = torch.mm(grad, b.to(dtype)).mul_(ctx.scaling)
            if ctx.needs_input_grad[2]:
                grad_b = torch.mm(grad.t(), small).mul_(ctx.scaling).to(b.dtype)
            del grad
            if x is not None:
                grad_a = torch.mm(grad_small.t(), x.reshape(-1, x.shape[-1]).to(dtype)).to(a.dtype)
            if ctx.needs_input_grad[0]:
                weight = ctx.base.dense(grad_y.dtype)
                grad_x = torch.mm(grad_y.to(weight.dtype), weight).to(ctx.x_dtype)
                _add_product(grad_x, grad_small, a.to(dtype))
                grad_x = grad_x.view(shape)
        return grad_x, grad_a, grad_b, None, None
