"""A head that does not train: what every single pass over such a head takes and refuses, and its backward.

The log-probability of a token depends on that token's hidden state alone. With a frozen head, backward therefore needs
only one H-vector per token,

    d logp_i / d hidden_i = (W[y_i] - p_i W) * logit_scale / temperature

The forward can compute this vector while it holds the logits, whatever the loss is. Backward only scales the vector.
That takes two matrix products of size N x V x H. A head that rebuilds its logits in backward, as TRL's, needs three.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Head(NamedTuple):
    """LM head: turns hidden states into the logits of a tempered softmax."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None
    logit_scale: float


# hidden (N, H), targets, head, whether derivatives are wanted -> log-probs (N,), entropies (N,), derivatives (N, H)
Score = Callable[[Tensor, Tensor, Head, bool], tuple[Tensor, Tensor, Tensor | None]]

_backward_computes_again: ContextVar[bool] = ContextVar("backward_computes_again", default=False)


@contextmanager
def for_values_alone() -> Iterator[None]:
    """Form no derivatives inside: the forward of a checkpoint, whose backward computes everything again."""
    token = _backward_computes_again.set(True)
    try:
        yield
    finally:
        _backward_computes_again.reset(token)


def frozen_logprob(score: Score, hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from `score`. Only `hidden` gets a gradient.

    Raises:
        ValueError: the weight or the bias trains, or the weight is not a plain floating tensor.
    """
    reason = _unfit_weight(head.weight) or (_training(head.weight, head.bias) if torch.is_grad_enabled() else None)
    if reason is not None:
        raise ValueError(f"The single-pass head cannot be used: {reason}. Use TRL's own head.")
    return _SinglePass.apply(score, hidden, targets, head, torch.is_grad_enabled() and hidden.requires_grad)


def why_not(lm_head: nn.Module) -> str | None:
    """Reason why this head cannot be computed in a single pass. None if it can."""
    # LoRA, quantized layers and offloading each bring a forward of their own.
    if (
        not isinstance(lm_head, nn.Linear)
        or type(lm_head).forward is not nn.Linear.forward
        or "forward" in vars(lm_head)
    ):
        return f"the head is no plain nn.Linear but {type(lm_head).__name__} with a forward of its own"
    hooks = (lm_head._forward_hooks, lm_head._forward_pre_hooks, lm_head._backward_hooks, lm_head._backward_pre_hooks)
    if any(hooks):
        return "the head has hooks, which would not be called"
    return _unfit_weight(lm_head.weight) or _training(lm_head.weight, lm_head.bias)


def _unfit_weight(weight: Tensor) -> str | None:
    # Quantized and sharded (DTensor) weights are subclasses, some of which pose as floating tensors.
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in PLAIN_DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, no plain floating tensor"
    if weight.dim() != 2 or weight.device.type == "meta":
        return f"its weight is not there (shape {tuple(weight.shape)} on {weight.device}): sharded or offloaded"
    return None


def _training(weight: Tensor, bias: Tensor | None) -> str | None:
    trained = [
        name for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None and tensor.requires_grad
    ]
    return f"its {' and '.join(trained)} would get no gradient (requires_grad=True)" if trained else None


class _SinglePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, score: Score, hidden: Tensor, targets: Tensor, head: Head, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        again = _backward_computes_again.get()
        logps, entropy, vectors = score(hidden, targets, head, with_gradient and not again)
        if with_gradient and again:  # a checkpoint asks for as many saved tensors of the same shapes as later
            vectors = hidden.new_empty(()).expand_as(hidden)
        ctx.save_for_backward(vectors)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, _: None) -> tuple[None, Tensor | None, None, None, None]:
        (vectors,) = ctx.saved_tensors
        if grad_logps is None:
            return None, None, None, None, None
        # With `out` the product is rounded once, from float32, and no float32 copy is made.
        return None, torch.mul(vectors, grad_logps.unsqueeze(1), out=torch.empty_like(vectors)), None, None, None
