"""Figures for the log: nothing that a figure raises, or turns out to be, can end a training.

A figure that cannot be computed is left out of the log, and one warning says why.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trl import GRPOTrainer

from grpo_plus.advantages import Rewards
from grpo_plus.advantages.metrics import share_with_absent_tasks
from grpo_plus.trainer.names import metrics_of


class Figures:
    """The figures that one run logs beside TRL's."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer
        self._warned: set[str] = set()

    @contextmanager
    def guarded(self, source: str) -> Iterator[None]:
        """Turn whatever is raised inside into one warning in a run. Only what no other process waits for goes inside.

        Args:
            source: what computes the figures, for the warning.
        """
        try:
            yield
        # A figure may fail in any way, in a hook of the user's too, and days of training must not end for it.
        except Exception as error:
            self.warn(
                source, f"{source} raised {type(error).__name__}: {error}. The training goes on without its figures."
            )

    def log_advantages(self, rewards: Rewards, compute: Callable[[], Mapping[str, Any]]) -> None:
        """Log under `advantages/` what `compute` returns, and warn where no completion of the batch was judged."""
        if not rewards.judged.any():
            self.warn(
                "unjudged",
                f"No reward function judged any of the {rewards.judged.numel()} completions of step "
                f"{self._trainer.state.global_step}. Their advantages are 0. If a judge is down, stop and resume when "
                "it is back; further batches of this kind are not reported.",
            )
        values = {f"advantages/{name}": value for name, value in self._numbers("advantage_metrics", compute).items()}
        logged = metrics_of(self._trainer)
        share_with_absent_tasks(logged, values)
        for name, value in values.items():
            logged[name].append(value)

    def warn(self, cause: str, message: str) -> None:
        """Warn once in a run of each cause."""
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, stacklevel=2)

    def _numbers(self, source: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, float]:
        """The figures that are numbers. TRL's log could not average the others."""
        numbers: dict[str, float] = {}
        with self.guarded(source):
            for name, value in compute().items():
                with self.guarded(f"{source}, figure {name!r},"):
                    numbers[name] = float(value)
        return {name: number for name, number in numbers.items() if not math.isnan(number)}
