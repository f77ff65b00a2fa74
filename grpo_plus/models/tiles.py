"""MLPs and norms of long rows, so many tokens at a time.

In a layer's backward live the two halves of its MLP, their product, and the derivatives of all three: (N, I) each, for
an intermediate width I. A tile is a part of the N tokens, and the same is done for one tile after another:

    y_i = f(x_i);           grad_x_i, grad_w += grad of f(x_i) with respect to x_i and w, times grad_y_i

Only x is kept for the backward, which computes f once more, with the graph of one tile at a time. Under gradient
checkpointing this costs nothing more. There a layer's forward runs again until the last tensor that it had saved is
back. That tensor is x, which is saved before f is computed, so the MLP's second forward is left out and its third one,
here, stands for it. Layers that save something after the MLP (a norm of its output, as Gemma's) and reentrant
checkpoints compute it a third time.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo_plus.models.dense import dense_weights
from grpo_plus.models.row_wise import is_mlp, row_wise_modules, width_of

logger = logging.getLogger("grpo_plus")

LIMITS = {torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative error that is rounding; 1e-3 in wider dtypes


class TiledForward(partial):
    """A `forward` of ours on an instance."""


class Tiles:
    """Computes the MLPs and norms of a model in tiles.

    Args:
        tokens: the most in a tile. Shorter inputs go through the module's own forward.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._modules: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Compute in tiles, inside. The backward belongs inside."""
        if model not in self._modules:
            self._modules[model] = _checked_modules(model)
        changed: list[Any] = [module for module in self._modules[model] if "forward" not in vars(module)]
        for module in changed:
            # No bound method, so that a copy of the module calls the forward on itself.
            module.forward = TiledForward(_forward, self.tokens, module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward


def _checked_modules(model: nn.Module) -> list[nn.Module]:
    modules = row_wise_modules(model, why_not_tiled)
    if not any(is_mlp(module) for module in modules):
        logger.info("mlp_tile_tokens: norms only. No MLP of the model is two or three linear layers and an activation.")
    return modules


def why_not_tiled(module: nn.Module) -> str | None:
    """Reason why a module is not the same in tiles: what it gives for five tokens, whole and in tiles of two."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    floats = [weight for weight in module.parameters() if weight.is_floating_point()]
    like = floats[0] if floats else torch.empty((), dtype=torch.bfloat16, device=next(module.parameters()).device)
    numbers = torch.arange(5.0 * width_of(module), dtype=torch.float64)
    x = (0.7 * numbers).sin().view(1, 5, -1).to(like).requires_grad_()
    results = []
    with torch.enable_grad():
        for forward in (type(module).forward, partial(_forward, 2)):
            output = forward(module, x)
            weighted = (output * (0.3 * numbers[: output.numel()]).cos().view_as(output).to(output)).sum()
            gradients = torch.autograd.grad(weighted, [x, *weights], allow_unused=True)
            results.append([output.detach(), *(gradient for gradient in gradients if gradient is not None)])
    whole, tiled = results
    limit = LIMITS.get(output.dtype, 1e-3)
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(tiled, whole, strict=True)]
    if max(errors) <= limit:
        return None
    reason = f"{type(module).__name__} is not the same in tiles: it differs by {max(errors):.1e}"
    logger.info("mlp_tile_tokens: %s. Its input stays whole.", reason)
    return reason


def _forward(tokens: int, module: nn.Module, x: Tensor) -> Tensor:
    count = x.shape[:-1].numel() if x.dim() < 4 else x.shape[:2].numel()
    if count <= tokens:
        return type(module).forward(module, x)
    call = _Call(module, tokens, x)
    if not torch.is_grad_enabled():
        return call.output(x)
    kept = _Keep.apply(x, call, *call.weights)
    return _Compute.apply(kept, x.detach(), call) if kept.requires_grad else call.output(x)


class _Call:
    """One call of a module in tiles.

    Attributes:
        weights: those that train.
        grad: what reaches the output, on its way from the backward of one step of autograd to that of the other.
    """

    def __init__(self, module: nn.Module, tokens: int, x: Tensor) -> None:
        self._module, self._tokens = module, tokens
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.grad: Tensor | None = None
        kind = x.device.type
        self._kind, self._autocast = kind, torch.is_autocast_enabled(kind)
        self._dtype = torch.get_autocast_dtype(kind)

    def output(self, x: Tensor) -> Tensor:
        """The module's output, without a graph."""
        output: Tensor | None = None
        done = 0
        # Copies of weights that autocast would keep have no graph here, and a later forward would take them.
        with torch.no_grad(), self._casts(cached=False), dense_weights(self._module):
            for part in self._parts(x):
                found = type(self._module).forward(self._module, part)
                if output is None:
                    output = found.new_empty(len(_rows(x)), *found.shape[2:])
                output[done : done + found.shape[1]] = found[0]
                done += found.shape[1]
        assert output is not None
        return output.view(*x.shape[:-1], output.shape[-1])

    def gradients(self, x: Tensor, grad: Tensor, *, needs_x: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of the weights. The weights' sums over the tiles are in float32 or wider."""
        of_x = x.new_empty(x.shape)
        totals: list[Tensor | None] = [None] * len(self.weights)
        with dense_weights(self._module):
            for part, of_output, of_part in zip(*map(self._parts, (x, grad, of_x)), strict=True):
                leaf = part.detach().requires_grad_(needs_x)
                with torch.enable_grad(), self._casts(cached=True):
                    output = type(self._module).forward(self._module, leaf)
                inputs = [leaf, *self.weights] if needs_x else self.weights
                found = list(torch.autograd.grad(output, inputs, of_output, allow_unused=True))
                if needs_x:
                    of_part.copy_(found.pop(0))
                totals = [_sum(total, more) for total, more in zip(totals, found, strict=True)]
        typed = zip(totals, self.weights, strict=True)
        return of_x if needs_x else None, [None if total is None else total.to(weight.dtype) for total, weight in typed]

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        """Tiles (1, n, ...) of nearly one size: a tile of one token would look like a step of generation."""
        rows = _rows(x)
        return rows.unsqueeze(0).tensor_split(-(-len(rows) // self._tokens), dim=1)

    def _casts(self, *, cached: bool) -> AbstractContextManager[Any]:
        if not self._autocast:
            return nullcontext()
        return torch.autocast(self._kind, self._dtype, cache_enabled=cached)


class _Keep(torch.autograd.Function):
    """Saves x before the module is computed. In backward, the gradient comes by way of the call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return x.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        call, grad = ctx.call, ctx.call.grad
        call.grad = None
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        (x,) = ctx.saved_tensors
        of_x, of_weights = call.gradients(x, grad, needs_x=ctx.needs_input_grad[0])
        return of_x, None, *of_weights


class _Compute(torch.autograd.Function):
    """Computes the module, and saves nothing."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, x: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.output(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None]:
        ctx.call.grad = grad
        return None, None, None


def _rows(x: Tensor) -> Tensor:
    """(tokens, ...) of hidden states (N, H) or (B, L, H), or of heads (B, L, heads, D)."""
    return x if x.dim() == 2 else x.flatten(0, 1)


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if more is None:
        return total
    wide = torch.promote_types(more.dtype, torch.float32)
    return more.to(wide) if total is None else total.add_(more)
