"""Log-probabilities of tokens and entropies from hidden states: the LM head, and what is read off its logits.

`reference` builds all logits. The backends build one tile of logits at a time, each tile once, and need a head that
does not train: `single_pass` ("torch") runs anywhere, `triton` ("triton") on a GPU. `frozen` holds what the backends
share. `why_not` says whether a model's head will do, and `why_not_on` whether a device will do.

`kept` holds the tokens that a sampler with top_p or the like could draw. "torch" can normalize over these alone, and
`trained` does so for a head that trains. `listed` does so for any head, without the other tokens' logits.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from grpo_plus.kernels.linear_logprob.frozen import why_not
from grpo_plus.kernels.linear_logprob.single_pass import linear_logprob

BACKENDS = ("torch", "triton")


def backend(name: str) -> Any:
    """Get `linear_logprob` of a backend. Triton is imported here and not before."""
    return linear_logprob if name == "torch" else _triton().linear_logprob


def why_not_on(name: str, device: str) -> str | None:
    """Reason why a backend cannot run on a kind of device. None if it can."""
    if name == "torch":
        return None
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton; torch brings it along on Linux with CUDA)"
    reason: str | None = _triton().why_not_on(device)
    return reason


def _triton() -> Any:
    return import_module("grpo_plus.kernels.linear_logprob.triton")


__all__ = ["BACKENDS", "backend", "linear_logprob", "why_not", "why_not_on"]
