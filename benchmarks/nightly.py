"""Train to the end what the suite only begins: the demo on five seeds, one seed resumed, and the real model once.

python -m benchmarks.nightly [--seeds 5] [--leave_out_real_model]

Every seed of the demo must begin with few right answers and end with nearly all right. The resumed run stops in the
middle, and a new trainer takes it up: its weights must end with the bits of the run that nobody stopped. The real model
is the first seed of benchmarks/real_model.py, and must learn what it learned there, rounding aside. Anything else ends
with an error. One thread.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_utils import SaveStrategy

from benchmarks import demo
from benchmarks.machine import in_a_process
from grpo_plus.demo import task
from grpo_plus.demo.run import MAX_STEPS, NUM_HELD_OUT, WARM_UP_STEPS, demo_config, demo_trainer, warmed_up_model
from grpo_plus.demo.tiny import tiny_tokenizer
from tests.close import differing

# Shares of right answers. benchmarks/results/ has 7 % and 99 % of the demo, 26 % and 76 % of the real model.
DEMO_BEFORE, DEMO_AFTER = 0.15, 0.95
REAL_BEFORE, REAL_AFTER = 0.30, 0.70


@dataclass(frozen=True)
class Outcome:
    """What a run came to, and whether that is as it must be."""

    name: str
    found: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'FAIL'} {self.name:<28} {self.found}"


def main() -> None:
    """Run one after the other, and print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--leave_out_real_model", action="store_true", help="needs no package beside those of the demo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for outcome in outcomes(args.seeds, real=not args.leave_out_real_model):
        print(outcome, flush=True)
        failed += not outcome.holds
    if failed:
        sys.exit(f"{failed} runs did not end as they must.")


def outcomes(seeds: int, *, real: bool) -> Iterator[Outcome]:
    """Every run, one when it is done."""
    for seed in range(seeds):
        run = demo.measure(seed, None, qlora=False)
        yield learned(f"demo, seed {seed}", run["accuracy_before"], run["accuracy_after"], DEMO_BEFORE, DEMO_AFTER)
    yield resumed(seed=0, steps=MAX_STEPS, warm_up_steps=WARM_UP_STEPS)
    if real:
        accuracy = list(in_a_process("benchmarks.real_model", ["--run", "plus 0"], 1)["accuracy"].values())
        yield learned("real model, seed 0", accuracy[0], accuracy[-1], REAL_BEFORE, REAL_AFTER)


def learned(name: str, before: float, after: float, most_before: float, least_after: float) -> Outcome:
    """Whether a run began with few right answers and ended with many."""
    bars = f"at most {most_before:.0%} before, at least {least_after:.0%} after"
    return Outcome(name, f"{before:.1%} -> {after:.1%} right; {bars}", before <= most_before and after >= least_after)


def resumed(seed: int, steps: int, warm_up_steps: int) -> Outcome:
    """Whether a run that stops in the middle and is taken up ends with the weights of one that does not stop."""
    model = warmed_up_model(tiny_tokenizer(), seed, warm_up_steps)
    with tempfile.TemporaryDirectory() as folder:
        whole = _trained(Path(folder, "whole"), copy.deepcopy(model), seed, steps)
        stopped = _trained(Path(folder, "stopped"), copy.deepcopy(model), seed, steps, stops=True)
        taken_up = _trained(Path(folder, "stopped"), model, seed, steps, resumes=True)
    halfway = bool(differing(stopped, whole))
    others = differing(taken_up, whole)
    found = f"{len(others)} of {len(whole)} weights differ after {steps} steps, stopped after {steps // 2}"
    return Outcome(f"demo, seed {seed}, resumed", found, halfway and not others)


def _trained(
    folder: Path, model: Any, seed: int, steps: int, *, stops: bool = False, resumes: bool = False
) -> dict[str, torch.Tensor]:
    """The weights at the end of a run, or where it stops."""
    config = demo_config(folder, seed, steps, None, "dapo")
    config.save_strategy, config.save_steps = SaveStrategy.STEPS, steps // 2
    held_out = task.dataset("held_out", NUM_HELD_OUT, seed)
    trainer = demo_trainer(config, model, tiny_tokenizer(), held_out, None)
    if stops:
        trainer.add_callback(StopAt(steps // 2))
    trainer.train(resume_from_checkpoint=resumes)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


class StopAt(TrainerCallback):
    """Ends a training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Once the step is done, before it is saved."""
        control.should_training_stop = state.global_step >= self.step


if __name__ == "__main__":
    main()
