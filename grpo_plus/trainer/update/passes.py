"""How many tokens an update sends through the model at once."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from trl import GRPOTrainer

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.config.speed import AUTO_PASSES
from grpo_plus.planner import plan
from grpo_plus.planner.loaded import shape_and_run
from grpo_plus.trainer.update.spread import least

logger = logging.getLogger("grpo_plus")


@dataclass
class Passes:
    """Bound of the passes through the model.

    Attributes:
        tokens: most tokens of one pass. None: a whole micro-batch.
        fitting: (tokens of a prompt) -> the bound that the free memory asks for, read before the first update. The
            bound is then halved where the memory runs out all the same. None: the bound stays as it is.
    """

    tokens: int | None = None
    fitting: Callable[[int], int | None] | None = None
    _is_read: bool = False

    @property
    def adapts(self) -> bool:
        """Whether the bound is found and not given."""
        return self.fitting is not None

    def read(self, prompt_length: int) -> None:
        """Read the free memory, once."""
        if self.fitting is None or self._is_read:
            return
        self.tokens, self._is_read = self.fitting(prompt_length), True
        if self.tokens is not None:
            logger.info(
                "max_tokens_per_pass: %d. The free memory does not hold an update of a whole micro-batch.", self.tokens
            )

    def rows(self, batch_size: int | None, length: int) -> int | None:
        """Rows of `length` tokens that go through the model together, `batch_size` at most. None: all."""
        if self.tokens is None:
            return batch_size
        fitting = max(1, self.tokens // length)
        return fitting if batch_size is None else min(batch_size, fitting)

    def shrink(self, tokens: int) -> None:
        """Let a pass have so many tokens from here on."""
        self.tokens = tokens
        logger.warning(
            f"An update ran out of memory. From here on, {tokens} tokens at most go through the model at a time. The "
            f"micro-batch is computed again. To save the attempt, set max_tokens_per_pass={tokens}."
        )


def passes_of(trainer: GRPOTrainer, config: GRPOPlusConfig, reason: str | None) -> Passes:
    """The bound that a run begins with.

    Args:
        reason: why the rows of a micro-batch must go through the model together. None where no reason is known.

    Raises:
        ValueError: a number was asked for in spite of the reason.
    """
    size = config.max_tokens_per_pass
    if size is not None and reason is not None and size != AUTO_PASSES:
        raise ValueError(f"max_tokens_per_pass={size} is not possible: {reason}. Leave max_tokens_per_pass unset.")
    if size is None or reason is not None:
        return Passes()
    if size == AUTO_PASSES:
        return Passes(fitting=lambda prompt_length: least(tokens_that_fit(trainer.model, config, prompt_length)))
    return Passes(int(size))


def tokens_that_fit(model: Any, args: Any, prompt_length: int) -> int | None:
    """Tokens of the most rows of full length whose update fits into a CUDA device by the planner's count.

    None where a whole micro-batch fits, on other devices, and for a model or optimizer that the planner does not know.
    """
    if model.device.type != "cuda":
        return None
    try:
        shape, run = shape_and_run(model, args, max(prompt_length, 1))
    except ValueError as reason:
        logger.info("max_tokens_per_pass: a whole micro-batch until memory runs out. Nothing is counted: %s", reason)
        return None
    free, _ = torch.cuda.mem_get_info(model.device)
    # The planner counts what is there already, too: weights, gradients and the optimizer's state.
    available = free + torch.cuda.memory_reserved(model.device)

    def fits(rows: int) -> bool:
        planned = plan(shape, replace(run, max_tokens_per_pass=run.tokens_of(rows)))
        return planned.phase("update") - planned.constants.context_bytes <= available

    rows = run.per_device_train_batch_size
    if fits(rows):
        return None
    return run.tokens_of(next((fewer for fewer in range(rows - 1, 1, -1) if fits(fewer)), 1))
