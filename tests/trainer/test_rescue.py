"""An error that ends a training leaves the last finished step as a checkpoint, which goes on as if nothing had been."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.saving.checkpoints import numbered, why_unusable
from grpo_plus.trainer.saving.manifest import begin
from tests.close import differing
from tests.training import PROMPTS, brevity, logs_of, make_trainer, vowels, weights_of

# A batch lasts for two steps of two micro-batches; the log and a regular checkpoint are rarer than steps.
CONFIG: dict[str, Any] = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "max_completion_length": 4,
    "advantage_estimator": "ema_task",
    "task_column": "answer",
    "log_completions": True,
}


class StopError(Exception):
    pass


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event: str, step: int, act: Callable[[], None]):
        self.step, self.act = step, act
        setattr(self, event, self.called)

    def called(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def fail(error: type[BaseException] = StopError) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


def failing_reward(calls: int) -> Callable[..., list[float]]:
    """A reward that is down after so many calls."""
    seen = []

    def judge(completions: list[str], **_: Any) -> list[float]:
        seen.append(len(completions))
        if len(seen) > calls:
            raise StopError
        return vowels(completions)

    judge.__name__ = "vowels"
    return judge


def made(folder: Path, *callbacks: TrainerCallback, reward: Any = vowels, **config: Any) -> GRPOPlusTrainer:
    return make_trainer(
        folder,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        reward_funcs=[reward, brevity],
        trainer_arguments={"callbacks": list(callbacks), "eval_dataset": PROMPTS.select(range(2))},
        **CONFIG | config,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> GRPOPlusTrainer:
    trainer = made(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def figures_of(trainer: GRPOPlusTrainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in ("train_loss", "total_flos")} for entry in logs_of(trainer)]


def assert_goes_on(folder: Path, whole: GRPOPlusTrainer, step: int) -> None:
    """The newest checkpoint is that of the step, and the run that resumes from it is the whole run."""
    assert why_unusable(folder / f"checkpoint-{step}") is None
    assert max(numbered(folder)) == step
    resumed = made(folder)
    resumed.train(resume_from_checkpoint=True)
    assert differing(weights_of(resumed), weights_of(whole)) == []
    assert figures_of(resumed) == figures_of(whole)
    assert resumed.estimator_state == whole.estimator_state


def raises_in_loss(trainer: GRPOPlusTrainer, call: int, error: type[BaseException]) -> None:
    """Let a micro-batch of the training end in an error."""
    compute, calls = trainer._compute_loss, []

    def counted(model: Any, inputs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > call:
            raise error
        return compute(model, inputs)

    trainer._compute_loss = counted


@pytest.mark.parametrize("leftover", [False, True])
def test_a_reward_function_that_raises_leaves_the_last_finished_step(tmp_path, whole, leftover, caplog):
    if leftover:  # of an earlier run that was killed while it saved this step
        begin(tmp_path / "checkpoint-4")
        (tmp_path / "checkpoint-4/model.safetensors").write_text("half")
    # Each generation batch is two micro-batches of one call, and lasts for two steps.
    with pytest.raises(Exception, match="vowels"), caplog.at_level(logging.WARNING, logger="grpo_plus"):
        made(tmp_path, reward=failing_reward(2)).train()
    assert "ends the training after step 4. That step is in" in caplog.text
    assert_goes_on(tmp_path, whole, 4)


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("micro_batches", [6, 7])
def test_an_error_within_a_step_leaves_the_step_before(tmp_path, whole, micro_batches, error):
    """Step 4 fails, in its first micro-batch or in its second: the estimator, the figures and the loss have moved on."""
    trainer = made(tmp_path)
    raises_in_loss(trainer, micro_batches, error)
    with pytest.raises(error):
        trainer.train()
    assert_goes_on(tmp_path, whole, 3)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_that_a_signal_asks_for_holds_a_finished_step(tmp_path, whole, event):
    """transformers' enable_jit_checkpoint saves within a step, after a batch was generated and gradients were made."""
    trainer = made(tmp_path, enable_jit_checkpoint=True)
    (jit,) = (part for part in trainer.callback_handler.callbacks if isinstance(part, JITCheckpointCallback))

    def ask() -> None:
        jit.jit_manager.is_checkpoint_requested = True

    # Step 3 begins with a new generation batch. The callback is asked before transformers' own.
    asks = At(event, 3 if event == "on_step_end" else 2, ask)
    trainer.callback_handler.callbacks.insert(0, asks)
    trainer.train()
    step = asks.step
    assert why_unusable(tmp_path / f"checkpoint-{step}") is None
    resumed = made(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert differing(weights_of(resumed), weights_of(whole)) == []
    assert resumed.estimator_state == whole.estimator_state


def test_an_error_at_the_end_of_a_step_leaves_that_step(tmp_path, whole):
    with pytest.raises(StopError):
        made(tmp_path, At("on_step_end", 3, fail())).train()
    assert_goes_on(tmp_path, whole, 3)


@pytest.mark.parametrize("event", ["on_log", "on_evaluate", "on_prediction_step"])
def test_figures_that_were_logged_before_the_error_are_not_counted_again(tmp_path, event):
    """The log of step 2 is written, and the run ends in what follows it."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    with pytest.raises(StopError):
        made(tmp_path, At(event, 2, fail()), **evaluation).train()
    resumed, undisturbed = made(tmp_path), made(tmp_path / "undisturbed")
    assert resumed._checked(True) == str(tmp_path / "checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    undisturbed = made(tmp_path / "undisturbed")
    undisturbed.train()
    expected = [
        entry["reward"] for entry in undisturbed.state.log_history if entry.get("step") == 4 and "reward" in entry
    ]
    assert [e["reward"] for e in resumed.state.log_history if e.get("step") == 4 and "reward" in e] == expected
    assert differing(weights_of(resumed), weights_of(undisturbed)) == []


def test_the_same_trainer_can_go_on(tmp_path, whole):
    trainer = made(tmp_path)
    undisturbed = trainer._compute_loss
    raises_in_loss(trainer, 7, StopError)
    with pytest.raises(StopError):
        trainer.train()
    trainer._compute_loss = undisturbed
    trainer.train(resume_from_checkpoint=True)
    assert differing(weights_of(trainer), weights_of(whole)) == []
    assert figures_of(trainer) == figures_of(whole)
    assert trainer.estimator_state == whole.estimator_state


def test_an_error_in_the_first_step_after_a_resume_leaves_the_checkpoint_as_it_was(tmp_path, whole):
    with pytest.raises(StopError):
        made(tmp_path, At("on_step_end", 3, fail())).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-3").iterdir()}
    trainer = made(tmp_path)
    raises_in_loss(trainer, 1, StopError)
    with pytest.raises(StopError):
        trainer.train(resume_from_checkpoint=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-3").iterdir()} == before
    assert_goes_on(tmp_path, whole, 3)


def test_a_step_that_has_its_checkpoint_is_not_saved_again(tmp_path):
    trainer = made(tmp_path, save_steps=1)
    raises_in_loss(trainer, 5, StopError)
    saved = []
    trainer._seal, seal = lambda folder: (saved.append(folder.name), seal(folder)), trainer._seal
    with pytest.raises(StopError):
        trainer.train()
    assert saved == ["checkpoint-1", "checkpoint-2"]


def spoil(trainer: GRPOPlusTrainer) -> Callable[[], None]:
    def act() -> None:
        next(trainer.model.parameters()).data[0] = torch.nan
        raise StopError

    return act


@pytest.mark.parametrize(("what", "reason"), [("weights", "is not finite"), ("optimizer", "was moving the weights")])
def test_weights_that_are_not_a_finished_steps_are_not_saved(tmp_path, what, reason, caplog):
    trainer = made(tmp_path)
    if what == "weights":
        trainer.add_callback(At("on_step_end", 2, spoil(trainer)))
    else:
        trainer.add_callback(At("on_optimizer_step", 1, fail()))
    with pytest.raises(StopError), caplog.at_level(logging.WARNING, logger="grpo_plus"):
        trainer.train()
    assert reason in caplog.text
    assert numbered(tmp_path) == {}


def test_a_run_without_checkpoints_writes_none(tmp_path):
    trainer = made(tmp_path, save_strategy="no")
    raises_in_loss(trainer, 7, StopError)
    with pytest.raises(StopError):
        trainer.train()
    assert numbered(tmp_path) == {}


def test_a_disk_that_is_full_hides_no_error(tmp_path, monkeypatch, caplog):
    trainer = made(tmp_path)
    raises_in_loss(trainer, 7, StopError)
    monkeypatch.setattr(torch, "save", fail(OSError))
    with pytest.raises(StopError), caplog.at_level(logging.WARNING, logger="grpo_plus"):
        trainer.train()
    assert "could not be saved: OSError" in caplog.text
    assert why_unusable(tmp_path / "checkpoint-3")
