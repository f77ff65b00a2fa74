"""Whether what sampled the completions is the policy that is trained: their log-probabilities of the same tokens."""

import math

from torch import Tensor

# Between vLLM and a trainer in bfloat16 the root mean square is 0.03 to 0.055 nats, as users measured on 0.5 B models
# (huggingface/trl#6789, ServiceNow/Fast-LLM#525): several times that is no rounding.
SUSPICIOUS = 0.2


def suspicion(differences: Tensor, step: int) -> str | None:
    """A warning about a sampler whose distance from the policy no rounding explains; None for any other.

    Args:
        differences: (n,) of the log-probabilities that both give the same tokens, in nats.
    """
    gap = math.sqrt(differences.float().square().mean().item()) if differences.numel() else 0.0
    if gap <= SUSPICIOUS:
        return None
    return (
        f"The completions of step {step} were not sampled from the policy that is trained: the log-probabilities that "
        f"both give their tokens differ by {gap:.2f} (root mean square; two engines in bfloat16 differ by about 0.05). "
        "Weights or adapters that did not reach the sampler, a sampler with another base, quantization or temperature, "
        "and truncated sampling (top_p, top_k, min_p) look like this. The updates are off-policy."
    )
