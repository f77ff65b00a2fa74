"""From hidden states to log-probabilities of tokens and entropies: the LM head and what is read off its logits.

`reference` builds all logits. The others build a tile of them at a time, once, and need a head that does not train:
`single_pass` ("torch") anywhere, `triton` ("triton") on a GPU. `frozen` holds what they share; `why_not` says whether a
model's head will do, `why_not_on` whether a device will.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from grpo_plus.kernels.linear_logprob.frozen import why_not
from grpo_plus.kernels.linear_logprob.single_pass import linear_logprob

BACKENDS = ("torch", "triton")


def backend(name: str) -> Any:
    """The `linear_logprob` of a backend; Triton is imported here and not before."""
    return linear_logprob if name == "torch" else _triton().linear_logprob


def why_not_on(name: str, device: str) -> str | None:
    """Why a backend cannot run on a kind of device; None if it can."""
    if name == "torch":
        return None
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton; torch brings it along on Linux with CUDA)"
    reason: str | None = _triton().why_not_on(device)
    return reason


def _triton() -> Any:
    return import_module("grpo_plus.kernels.linear_logprob.triton")


__all__ = ["BACKENDS", "backend", "linear_logprob", "why_not", "why_not_on"]
