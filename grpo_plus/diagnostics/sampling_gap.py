"""Whether what sampled the completions is the policy that is trained: their log-probabilities of the same tokens."""

import math

from torch import Tensor

# Between vLLM and a trainer in bfloat16 the root mean square is 0.03 to 0.055 nats, as users measured on 0.5 B models
# (huggingface/trl#6789, ServiceNow/Fast-LLM#525): several times that is no rounding.
SUSPICIOUS = 0.2


def sampling_gap(logps: Tensor, sampling_logps: Tensor, mask: Tensor) -> float:
    """√mean(Δ²) of the differences Δ over the tokens of (B, T) that count; tokens without a value (NaN) do not.

    Args:
        mask: (B, T), 1 where the policy wrote the token.
    """
    differences = (logps - sampling_logps).float()[mask.bool()]
    differences = differences[~differences.isnan()]
    return math.sqrt(differences.square().mean().item()) if differences.numel() else 0.0


def suspicion(gap: float, step: int) -> str | None:
    """A warning about a gap that rounding does not explain; None for any other."""
    if gap <= SUSPICIOUS:
        return None
    return (
        f"The completions of step {step} were not sampled from the policy that is trained: the log-probabilities that "
        f"both give their tokens differ by {gap:.2f} (root mean square; two engines in bfloat16 differ by about 0.05). "
        "Weights or adapters that did not reach the sampler, a sampler with another base, quantization or temperature, "
        "and truncated sampling (top_p, top_k, min_p) look like this. The updates are off-policy."
    )
