"""One arm: a trainer on the restored start, its log, its scores, and what it cost."""

import math
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus.compare.comparison import ArmResult
from grpo_plus.compare.loggers import name_run, run_of_its_own
from grpo_plus.compare.plan import Arm
from grpo_plus.compare.samples import for_file
from grpo_plus.compare.start import Start
from grpo_plus.compare.store import LOG, RESULT, SAMPLES, as_json, begin, write_json
from grpo_plus.compare.task import Scores, Task
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.trainer import GRPOPlusTrainer
from grpo_plus.trainer.profile import PhasePeaks
from grpo_plus.version import versions

TRAINING = "training"


def train_arm(task: Task, start: Start, arm: Arm, folder: Path, before: Scores, *, progress: bool) -> ArmResult:
    """Train the arm and write its result into its folder.

    Args:
        before: the scores of the start; the arm's must have the same names, and as many items.
    """
    begin(folder)
    write_json(folder, {"arm.json": as_json(identity(arm))})
    config = configuration(task, arm, folder)
    name_run(config, arm, folder.parents[1])
    trainer = quiet_trainer(task, start, config)
    if progress:
        trainer.add_callback(ArmBar(arm.name))
    try:
        result = _measured(task, trainer, arm)
        check_scores(result.scores, before)
        log, samples = trainer.state.log_history, held_out_samples(task, trainer)
    finally:
        release(trainer)
    write_json(folder, {LOG: log, SAMPLES: samples, RESULT: asdict(result)})
    return result


def _measured(task: Task, trainer: GRPOPlusTrainer, arm: Arm) -> ArmResult:
    """Train, then judge what was trained."""
    peaks = PhasePeaks(trainer.accelerator.device)
    peaks.enter(TRAINING)
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        with run_of_its_own(trainer):
            trainer.train()
    except SystemExit:  # SIGTERM has ended the training in good order, but there is no comparison
        raise SystemExit(128 + signal.SIGTERM) from None
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    peaks.enter(None)
    logged = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    return ArmResult(
        scores=held_out_scores(task, trainer, arm.seed),
        seconds=round(seconds, 2),
        cpu_seconds=round(cpu_seconds, 2),
        tokens=logged[-1] if logged else None,
        peak_bytes=peaks.peaks.get(TRAINING, peaks.overall),
        steps=trainer.state.global_step,
        versions=versions(),
    )


def identity(arm: Arm) -> dict[str, Any]:
    """The title and the settings by which an arm's folder is recognized."""
    return {"label": arm.variant.title, **arm.overrides}


def configuration(task: Task, arm: Arm, folder: Path) -> GRPOPlusConfig:
    """The arm's configuration; its completions, where they are logged, go to its folder."""
    return task.config(**arm.overrides, output_dir=str(folder))


def quiet_trainer(task: Task, start: Start, config: GRPOPlusConfig) -> GRPOPlusTrainer:
    """A trainer on the restored start that prints nothing per step."""
    trainer = task.trainer(start.restore(), config)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer


def held_out_scores(task: Task, trainer: GRPOPlusTrainer, seed: int) -> dict[str, list[float]]:
    """The task's scores of what was trained, as plain numbers."""
    set_seed(seed)
    scores = {name: [float(score) for score in values] for name, values in task.evaluate(trainer).items()}
    if not scores or not all(scores.values()):
        raise ValueError("The task's evaluate returned no scores. Return {name: [one number per held-out item]}.")
    for name, values in scores.items():
        if any(map(math.isinf, values)):
            raise ValueError(f"A held-out {name!r} is infinite and has no mean. Return finite numbers, NaN for none.")
    return scores


def held_out_samples(task: Task, trainer: GRPOPlusTrainer) -> list[dict[str, str]]:
    """What the trained model answers to a few held-out prompts, for a file."""
    return [] if task.samples is None else for_file(task.samples(trainer))


def check_scores(scores: Scores, before: Scores) -> None:
    """Refuse, with a ValueError, scores whose names or numbers of items are not those of the start."""
    there, here = ({name: len(values) for name, values in each.items()} for each in (before, scores))
    if here != there:
        raise ValueError(
            f"The task's evaluate returned {here} (name: number of items) after this training, but {there} at the "
            "start. It has to return the same scores of the same items each time; NaN where there is none."
        )


def release(trainer: GRPOPlusTrainer) -> None:
    """Let go of the optimizer, and of what accelerate has wrapped around the model's forward."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.optimizer = None
    trainer.accelerator.free_memory()


class ArmBar(TrainerCallback):
    """A bar on the terminal while an arm trains; it leaves no line."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", leave=False)

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Move it."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Show the newest reward."""
        reward = state.log_history[-1].get("reward")
        if reward is not None:  # TRL logs None where no completion was judged
            self.bar.set_postfix(reward=f"{reward:.2f}")

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Clear it."""
        self.bar.close()
