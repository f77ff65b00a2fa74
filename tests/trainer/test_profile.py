import time
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, StepProfile
from tests.close import differing
from tests.training import PROMPTS, brevity, logs_of, make_trainer, vowels, weights_of

PHASES = ("generate_s", "score_s", "update_s")
TRAINERS = [
    pytest.param({"trainer_class": GRPOTrainer, "config_class": GRPOConfig}, id="trl"),
    pytest.param({"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}, id="ours"),
]
PAUSE = 0.6


def profiled(output_dir, **arguments: Any) -> GRPOTrainer:
    trainer = make_trainer(output_dir, **arguments)
    trainer.add_callback(StepProfile(trainer))
    return trainer


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    key = f"profile/{name}"
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("classes", TRAINERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_phases_make_up_the_step(tmp_path, classes, accumulation):
    trainer = profiled(tmp_path, gradient_accumulation_steps=accumulation, **classes)
    trainer.train()
    steps = list(zip(*(logged(trainer, phase) for phase in PHASES), strict=True))
    assert len(steps) == 3
    assert min(min(step) for step in steps) > 0
    # TRL's own figure leaves out the optimizer; the run's has all steps and what lies between them.
    training_steps = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
    assert [(step, whole) for step, whole in zip(steps, training_steps, strict=True) if sum(step) < whole] == []
    assert sum(map(sum, steps)) <= trainer.state.log_history[-1]["train_runtime"]


def sleepily(function):
    def slow(*args, **kwargs):
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    slow.__name__ = "slow"
    return slow


class SlowOptimizer(TrainerCallback):
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(PAUSE)


@pytest.mark.parametrize("classes", TRAINERS)
@pytest.mark.parametrize("slow", PHASES)
def test_what_is_slow_shows_in_its_phase(tmp_path, classes, slow):
    rewards = (vowels, sleepily(brevity) if slow == "score_s" else brevity)
    trainer = profiled(tmp_path, reward_funcs=rewards, max_steps=2, **classes)
    if slow == "generate_s":
        trainer.model.generate = sleepily(trainer.model.generate)
    if slow == "update_s":
        trainer.add_callback(SlowOptimizer)
    trainer.train()
    for phase in PHASES:
        assert (min(logged(trainer, phase)) >= PAUSE) == (phase == slow)


def test_a_step_on_earlier_completions_neither_generates_nor_scores(tmp_path):
    trainer = profiled(tmp_path, num_iterations=2, max_steps=4)
    trainer.train()
    for phase in ("generate_s", "score_s"):
        assert [seconds > 0 for seconds in logged(trainer, phase)] == [True, False, True, False]


def test_a_log_of_several_steps_shows_their_mean(tmp_path):
    trainer = profiled(tmp_path, logging_steps=4, max_steps=4, reward_funcs=[sleepily(vowels)], num_iterations=2)
    trainer.train()
    # Two of the four steps score.
    (score,) = logged(trainer, "score_s")
    assert PAUSE / 2 <= score < PAUSE


def test_an_evaluation_is_no_part_of_a_step(tmp_path):
    def slow_in_evaluation(completions, **_: Any) -> list[float]:
        if not trainer.model.training:
            time.sleep(PAUSE)
        return vowels(completions)

    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 8}
    trainer = make_trainer(
        tmp_path,
        reward_funcs=[slow_in_evaluation],
        trainer_arguments={"eval_dataset": PROMPTS.select([0, 1])},
        **evaluation,
    )
    trainer.add_callback(StepProfile(trainer))
    trainer.train()
    evaluations = [entry["eval_runtime"] for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert len(evaluations) == 4
    assert min(evaluations) >= PAUSE
    assert max(logged(trainer, "score_s")) < PAUSE


BLOCK = 400_000_000  # bytes, more than the tiny model's own ups and downs
MEMORY_PHASES = ("generate", "score", "update", "optimizer")


def hungrily(function):
    def hungry(*args, **kwargs):
        block = torch.ones(BLOCK // 4)
        del block
        return function(*args, **kwargs)

    hungry.__name__ = "hungry"
    return hungry


class HungryOptimizer(TrainerCallback):
    def on_train_begin(self, *args: Any, optimizer, **kwargs: Any) -> None:
        optimizer.step = hungrily(optimizer.step)


@pytest.mark.parametrize("classes", TRAINERS)
@pytest.mark.parametrize("hungry", MEMORY_PHASES)
def test_what_is_hungry_shows_in_its_phases_peak(tmp_path, classes, hungry):
    rewards = (vowels, hungrily(brevity) if hungry == "score" else brevity)
    trainer = profiled(tmp_path, reward_funcs=rewards, max_steps=2, **classes)
    if hungry == "generate":
        trainer.model.generate = hungrily(trainer.model.generate)
    if hungry == "update":
        trainer.compute_loss = hungrily(trainer.compute_loss)
    if hungry == "optimizer":
        trainer.add_callback(HungryOptimizer)
    trainer.train()
    peaks = {phase: logged(trainer, f"{phase}_peak_gb")[-1] for phase in MEMORY_PHASES}
    others = max(peak for phase, peak in peaks.items() if phase != hungry)
    assert peaks[hungry] > others + 0.8 * BLOCK / 1e9, peaks
    assert logged(trainer, "peak_memory_gb")[-1] >= peaks[hungry]


def test_the_largest_peak_stays_in_the_log(tmp_path):
    block = hungrily(lambda: None)
    block()
    trainer = profiled(tmp_path)
    trainer.train()
    # The block was freed before the training: it counts for the process, and for no phase.
    peaks = logged(trainer, "peak_memory_gb")
    assert len(peaks) == 3
    assert peaks == sorted(peaks)
    phases = [logged(trainer, f"{phase}_peak_gb") for phase in MEMORY_PHASES]
    assert [phase for phase in phases if phase != sorted(phase)] == []


def test_an_evaluations_memory_is_no_phases(tmp_path):
    def hungry_in_evaluation(completions, **_: Any) -> list[float]:
        return vowels(completions) if trainer.model.training else hungrily(vowels)(completions)

    trainer = make_trainer(
        tmp_path,
        reward_funcs=[hungry_in_evaluation],
        trainer_arguments={"eval_dataset": PROMPTS.select([0, 1])},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
    )
    trainer.add_callback(StepProfile(trainer))
    trainer.train()
    peaks = [logged(trainer, f"{phase}_peak_gb")[-1] for phase in MEMORY_PHASES]
    assert logged(trainer, "peak_memory_gb")[-1] > max(peaks) + 0.8 * BLOCK / 1e9


def test_without_a_resettable_peak_only_the_whole_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_plus.trainer.profile._reset_peak", lambda device: False)
    trainer = profiled(tmp_path)
    trainer.train()
    assert logged(trainer, "peak_memory_gb")[-1] > 0
    assert [key for entry in trainer.state.log_history for key in entry if "_peak_gb" in key] == []


@pytest.mark.parametrize("classes", TRAINERS)
def test_training_is_the_same_with_and_without(tmp_path, classes):
    plain = make_trainer(tmp_path / "plain", **classes)
    plain.train()
    observed = profiled(tmp_path / "profiled", **classes)
    observed.train()
    stripped = [{k: v for k, v in entry.items() if not k.startswith("profile/")} for entry in logs_of(observed)]
    assert stripped == logs_of(plain)
    assert differing(weights_of(observed), weights_of(plain)) == []


class Wrapped(TrainerCallback):
    """Which attributes the trainer has of its own, during a step."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer, self.seen = trainer, set()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen |= {name for name, value in vars(self.trainer).items() if callable(value)}


def test_nothing_is_left_wrapped(tmp_path):
    trainer = profiled(tmp_path)
    recorder = Wrapped(trainer)
    trainer.add_callback(recorder)
    before = {name for name, value in vars(trainer).items() if callable(value)}
    trainer.train()
    assert len(recorder.seen - before) >= 2
    left = {name for name, value in vars(trainer).items() if callable(value)} - before
    assert not left & {"_generate", "_generate_and_score_completions"}


def test_a_method_that_somebody_else_replaced_is_put_back(tmp_path):
    trainer = profiled(tmp_path)
    theirs = sleepily(trainer._generate)
    trainer._generate = theirs
    trainer.train()
    assert trainer._generate is theirs
    assert min(logged(trainer, "generate_s")) >= PAUSE


def test_a_training_after_one_that_failed_is_measured_once_and_cleaned_up(tmp_path):
    failing = [True]

    def reward(completions, **_: Any) -> list[float]:
        if failing.pop() if failing else False:
            raise RuntimeError("no reward today")
        return vowels(completions)

    trainer = profiled(tmp_path, reward_funcs=[reward])
    with pytest.raises(RuntimeError, match="no reward today"):
        trainer.train()
    trainer.train()
    assert not {"_generate", "_generate_and_score_completions"} & set(vars(trainer))
    steps = sum(map(sum, zip(*(logged(trainer, phase) for phase in PHASES), strict=True)))
    assert 0 < steps <= trainer.state.log_history[-1]["train_runtime"]
