"""Specification of the head: all logits at once, and autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_plus.kernels.linear_logprob.kept import LEFT_OUT, Kept


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    kept: Kept | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of `targets`, and entropies (N,) without gradient.

        z = logit_scale * (hidden Wᵀ + bias),  z = softcap * tanh(z / softcap),  logp = log_softmax(z / temperature)

    Args:
        hidden: (N, H), in the dtype to compute in, unless autocast names another dtype.
        weight: (V, H).
        targets: (N,) token ids.
        kept: the tokens over which each softmax is taken. None takes the whole vocabulary.
        softcap: cap of the logits. None where the model does not cap its logits.

    Returns:
        float32, or float64 for float64 hidden states.
    """
    left_out = None if kept is None else kept.left_out(slice(0, len(targets)), len(weight))
    logps = log_softmax(hidden, weight, left_out, bias, temperature, softcap, logit_scale)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), -negative_entropy(logps).detach()


def log_softmax(
    hidden: Tensor,
    weight: Tensor,
    left_out: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Log-probabilities (N, V) of all tokens. Those that are `left_out`, (N, V) bool, get a probability of 0."""
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    if left_out is not None:
        logits = logits.masked_fill(left_out, LEFT_OUT)
    return logits.log_softmax(-1)


def negative_entropy(logps: Tensor) -> Tensor:
    """Sum of p log p, (N,)."""
    return (logps.exp() * logps).sum(-1)
