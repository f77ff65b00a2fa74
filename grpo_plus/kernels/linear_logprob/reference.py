"""Specification of the head: all logits at once, and autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
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
        softcap: cap of the logits. None where the model does not cap its logits.

    Returns:
        float32, or float64 for float64 hidden states.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits / temperature).log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), entropy.detach()
