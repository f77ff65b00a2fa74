"""Which rows meet in a micro-batch: TRL shuffles a prompt's completions apart, a shared prompt needs them together.

A row never leaves its optimizer step. The update stays what it was; only the order of a sum changes.
"""

from collections.abc import Callable
from typing import Any

import torch

from grpo_plus.packing import regroup, reorder
from grpo_plus.trainer.names import MULTIMODAL, trained_tokens

Inputs = dict[str, Any]


def regrouped(
    batches: list[Inputs], *, accumulation_steps: int, loss_type: str, alive: Callable[[Inputs], list[bool]]
) -> list[Inputs]:
    """The micro-batches of a generation batch with prompts together.

    Args:
        batches: TRL's dictionaries, in the order in which they are trained on.
        accumulation_steps: micro-batches that share an optimizer step.
        alive: which rows of a micro-batch go through the model; the others weigh nothing.
    """
    window = min(accumulation_steps, len(batches))
    if any(name in batches[0] for name in MULTIMODAL) or max(accumulation_steps, len(batches)) % window:
        return batches
    windows = [batches[start : start + window] for start in range(0, len(batches), window)]
    return [batch for part in windows for batch in _window(part, loss_type, alive)]


def _window(batches: list[Inputs], loss_type: str, alive: Callable[[Inputs], list[bool]]) -> list[Inputs]:
    """The micro-batches of one optimizer step."""
    prompts = torch.cat([batch["prompt_ids"] * batch["prompt_mask"] for batch in batches]).tolist()
    tokens = [
        int(length) if live else 0
        for batch in batches
        for length, live in zip(trained_tokens(batch).sum(1).tolist(), alive(batch), strict=True)
    ]
    order = regroup([tuple(prompt) for prompt in prompts], tokens, len(batches))
    if loss_type != "bnpo":
        return reorder(batches, order)
    # bnpo divides by the tokens of the micro-batch: a row keeps the divisor of the one that it came from.
    batches = [_times(batch, 1 / trained_tokens(batch).sum().clamp(min=1.0)) for batch in batches]
    return [_times(batch, trained_tokens(batch).sum().clamp(min=1.0)) for batch in reorder(batches, order)]


def _times(inputs: Inputs, factor: torch.Tensor) -> Inputs:
    return inputs | {"advantages": inputs["advantages"] * factor}
