"""Seconds and peak memory of each phase of a step: a callback for any GRPO trainer, TRL's or ours."""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus.trainer.names import GENERATES, PREPARES, log_value
from grpo_plus.trainer.update.spread import gathered


class StepProfile(TrainerCallback):
    """Logs the seconds of each phase of an optimizer step, and the peak memory, under `profile/`.

        trainer.add_callback(StepProfile(trainer))

    Seconds, each the mean over the optimizer steps since the last log. Together they are the step, without loading its
    prompts, evaluating or saving:

    - `generate_s`: completions, by whatever engine, with tool calls and decoding. 0 for a step that trains on the
      completions of an earlier step.
    - `score_s`: rewards, old and reference log-probabilities, advantages.
    - `update_s`: the rest of the step, forward to optimizer.

    Memory in 10⁹ bytes, allocated on the CUDA device or, on other machines, resident of the process:

    - `peak_memory_gb`: the most since the process began.
    - `generate_peak_gb`, `score_peak_gb`, `update_peak_gb` (forward and backward), `optimizer_peak_gb`: the most of
      each phase since training began, on a CUDA device and on Linux. These are the phases of `grpo-plus plan`. At each
      phase the peaks that torch or Linux keep for the process are reset.

    While training runs, two methods of this one trainer are wrapped. With several processes, seconds are the mean over
    them, and memory is that of the process that needs the most. Add the callback on every process: they wait for each
    other at the end of a step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._wrapped: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._began = 0.0
        self._memory = PhasePeaks()

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Wrap the methods."""
        self._restore()  # after a training that ended in an error
        self._memory = PhasePeaks(self.trainer.accelerator.device)
        for name in (GENERATES, PREPARES):
            self._seconds[name] = 0.0
            self._wrapped[name] = vars(self.trainer).get(name)
            setattr(self.trainer, name, self._timed(name, getattr(self.trainer, name)))

    def on_step_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Start the clock."""
        self._seconds = dict.fromkeys(self._seconds, 0.0)  # an evaluation may have run since
        self._began = self._now()
        self._memory.enter("update")

    def on_pre_optimizer_step(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """The gradients are complete and clipped."""
        self._memory.enter("optimizer")

    def on_optimizer_step(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """The weights have moved."""
        self._memory.enter("update")

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Hand the step's numbers to TRL's log, before it is written."""
        step = self._now() - self._began
        generate, prepare = self._seconds[GENERATES], self._seconds[PREPARES]
        seconds = {"generate_s": generate, "score_s": prepare - generate, "update_s": step - prepare}
        self._memory.enter(None)  # what follows, an evaluation or a save, is no part of a phase
        peaks = {f"{phase}_peak_gb": peak for phase, peak in self._memory.peaks.items()}
        if (overall := self._memory.overall) is not None:
            peaks["peak_memory_gb"] = overall
        processes = gathered((seconds, peaks))
        for name in seconds:
            log_value(self.trainer, f"profile/{name}", fmean(found[name] for found, _ in processes))
        for name in sorted({name for _, found in processes for name in found}):
            most = max(found[name] for _, found in processes if name in found)
            log_value(self.trainer, f"profile/{name}", most / 1e9, latest=True)

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Leave the trainer as it was."""
        self._restore()

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            # Between steps nothing is measured: TRL generates within evaluations, too.
            outer = self._memory.phase
            if outer is not None:
                self._memory.enter("generate" if name == GENERATES else "score")
            try:
                return method(*args, **kwargs)
            finally:
                self._memory.enter(outer)
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


class PhasePeaks:
    """The most memory in use in each phase, from counters that are read and reset wherever a phase ends.

    device: None measures nothing.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.phase: str | None = None
        self.peaks: dict[str, int] = {}
        self.overall = None if device is None else _peak_bytes(device)
        self._resets = device is not None and _reset_peak(device)

    def enter(self, phase: str | None) -> None:
        """End the current phase and begin another; None: what belongs to none."""
        if self.device is None:
            return
        if (peak := _peak_bytes(self.device)) is not None:
            self.overall = max(self.overall or 0, peak)
            if self._resets and self.phase is not None:
                self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak)
        if self._resets:
            _reset_peak(self.device)
        self.phase = phase


def _reset_peak(device: torch.device) -> bool:
    """Let the peak begin anew; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # 5 resets the peak of the resident size and nothing else (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes(device: torch.device) -> int | None:
    """The most memory in use so far; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    if (status := Path("/proc/self/status")).exists():
        # What getrusage says on Linux can be the parent's, and never falls below that.
        lines = status.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    import resource

    # Bytes on macOS, kibibytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
