"""Whether the last finished optimizer step can still be saved, when an error ends a training in the next one."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from grpo_plus.models.finite import nonfinite_weights
from grpo_plus.trainer.safety.guard import STEPS_WITHIN_BACKWARD

# Seconds for which the main process waits for the random states and batches of the others. An error that all
# processes meet, such as a reward function's, needs none of them.
PATIENCE = 20.0

logger = logging.getLogger("grpo_plus")


class OptimizerWatch:
    """Whether the optimizer has begun to move the weights since the last finished step."""

    def __init__(self) -> None:
        self.moved = False
        self._hook: Any = None

    def step_is_finished(self, trainer: GRPOTrainer) -> None:
        """Begin to watch the next step."""
        self.moved = False
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if self._hook is None and isinstance(optimizer, torch.optim.Optimizer):
            self._hook = optimizer.register_step_pre_hook(self._moves)

    def release(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    @property
    def watches(self) -> bool:
        """False for an optimizer that is not torch's, of which nothing is known."""
        return self._hook is not None

    def _moves(self, *_: Any) -> None:
        self.moved = True


def why_not_rescued(trainer: GRPOTrainer, watch: OptimizerWatch, *, step_ended: bool) -> str | None:
    """Why the weights in memory are not those of a finished step, or cannot be saved; None where they are.

    Args:
        step_ended: the optimizer step that ran has ended, and its callbacks may not all have been called.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "FSDP or DeepSpeed spreads the weights, and other processes may not be there to save theirs"
    if trainer.args.world_size > 1 and trainer.state.best_global_step:
        return "transformers would wait for processes that may be gone, to look for the best checkpoint"
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if not watch.watches or any(part in name for part in STEPS_WITHIN_BACKWARD):
        return "nothing tells whether the optimizer has begun to move the weights"
    if step_ended and trainer.args.sync_ref_model:
        return "the reference may not have followed the policy yet"
    if watch.moved and not step_ended:
        return "the optimizer was moving the weights"
    if names := nonfinite_weights(trainer.model):
        return f"the trained weight {names[0]!r} is not finite"
    return None


def all_are_there(paths: list[Path], since: float) -> bool:
    """Whether other processes write all of these files in time, not before `since` (seconds of the clock)."""
    deadline = time.monotonic() + PATIENCE
    while not all(path.exists() and path.stat().st_mtime >= since for path in paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
