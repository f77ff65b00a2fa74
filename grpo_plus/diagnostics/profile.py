"""Where the time of a step goes, and how much memory it takes: a callback for any GRPO trainer, TRL's or ours."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus._trl import GENERATES, PREPARES, log_value


class StepProfile(TrainerCallback):
    """Logs, under `profile/`, how many seconds of an optimizer step each phase takes, and the peak memory.

        trainer.add_callback(StepProfile(trainer))

    `generate_s` is the completions, by whatever engine, with tool calls and decoding. `score_s` is what else the
    update needs: rewards, old and reference log-probabilities, advantages. `update_s` is the rest of the step, forward
    to optimizer. They sum to the step, without loading its prompts, evaluating or saving. Each is the mean over the
    optimizer steps since the last log; a step that trains on completions of an earlier one generates for 0 s.

    `peak_memory_gb` (10⁹ bytes) is the most that was allocated on the CUDA device, or on other machines the largest
    resident size of the process, since the process began.

    While training runs, two methods of this one trainer are wrapped. Each process measures itself; the main one logs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._wrapped: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._began = 0.0

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Wrap the methods."""
        self._restore()  # after a training that ended in an error
        for name in (GENERATES, PREPARES):
            self._seconds[name] = 0.0
            self._wrapped[name] = vars(self.trainer).get(name)
            setattr(self.trainer, name, self._timed(name, getattr(self.trainer, name)))

    def on_step_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Start the clock."""
        self._seconds = dict.fromkeys(self._seconds, 0.0)  # an evaluation may have run since
        self._began = self._now()

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Hand the step's numbers to TRL's log, before it is written."""
        step = self._now() - self._began
        generate, prepare = self._seconds[GENERATES], self._seconds[PREPARES]
        phases = {"generate_s": generate, "score_s": prepare - generate, "update_s": step - prepare}
        for name, seconds in phases.items():
            log_value(self.trainer, f"profile/{name}", seconds)
        if (peak := _peak_bytes(self.trainer.accelerator.device)) is not None:
            log_value(self.trainer, "profile/peak_memory_gb", peak / 1e9, latest=True)

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Leave the trainer as it was."""
        self._restore()

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            try:
                return method(*args, **kwargs)
            finally:
                self._seconds[name] += self._now() - began

        return timed

    def _restore(self) -> None:
        for name, before in self._wrapped.items():
            if before is None:
                delattr(self.trainer, name)
            else:
                setattr(self.trainer, name, before)
        self._wrapped = {}

    def _now(self) -> float:
        # An accelerator runs behind: without waiting for it, a phase would pay for the one before.
        if (device := self.trainer.accelerator.device).type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()


def _peak_bytes(device: torch.device) -> int | None:
    """The most memory in use so far; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    # Bytes on macOS, kibibytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
