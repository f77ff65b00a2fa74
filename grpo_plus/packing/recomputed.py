"""Passes through a model of which the backward holds one at a time.

The forward computes all passes and keeps what the layers save of the last one only. The backward begins with that pass,
and computes every other pass again when its turn comes. The log-probabilities of all passes are there before the loss,
so that any loss can be taken of them.

    memory: one pass, whatever the number of passes
    time: a further forward of all passes but the last
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from grpo_plus.kernels.linear_logprob.frozen import for_values_alone
from grpo_plus.packing.forward import Logps, Pass, joined

Result = TypeVar("Result")


def one_by_one(passes: Iterable[Pass], count: int, device: torch.device) -> Logps:
    """Run passes inside the model's forward.

    Args:
        count: number of the passes. A single pass is run as it is.
        device: the model's.
    """
    if count == 1 or not torch.is_grad_enabled():
        return joined(part() for part in passes)
    scores = []
    for number, part in enumerate(passes, 1):
        # Passes that share a cast of a weight would sum their gradients in half precision.
        torch.clear_autocast_cache()
        scores.append(part() if number == count else recomputed(part, device))
    return joined(scores)


def recomputed(function: Callable[[], Result], device: torch.device) -> Result:
    """Compute, keep the result alone, and compute again in the backward."""
    # checkpoint keeps the random numbers of the devices that it finds among its arguments, and autocast likewise.
    place = torch.empty(0, device=device)
    result: Result = checkpoint(_called, place, function, use_reentrant=False, context_fn=_contexts)
    return result


def _called(_: torch.Tensor, function: Callable[[], Result]) -> Result:
    return function()


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the forward runs in, and what its repetition in the backward."""
    return for_values_alone(), nullcontext()
