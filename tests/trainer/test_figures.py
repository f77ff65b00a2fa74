"""Figures for the log: none of them can end a training, and none is made up where nothing was measured."""

import math
import warnings
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import ESTIMATORS, MODIFIERS, Rewards, estimate
from grpo_plus.advantages.metrics import advantage_metrics
from grpo_plus.compare.arm import ArmBar
from grpo_plus.demo.progress import RewardsOnTheBar
from tests.training import PROMPTS, logs_of, make_trainer, vowels, weights_of

OURS = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
UNJUDGED = "No reward function judged any of the 8 completions"


class DownOnce:
    """A judge that answers None to one of its calls."""

    __name__ = "judge"

    def __init__(self, call: int) -> None:
        self.calls, self.down = 0, call

    def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
        self.calls += 1
        return [None] * len(completions) if self.calls == self.down else vowels(completions)


def trained(output_dir, **settings: Any) -> tuple[Any, list[str]]:
    """A short training, and the messages of its warnings."""
    trainer = make_trainer(output_dir, **(OURS | {"max_steps": 2} | settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return trainer, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("config_class", "chosen"),
    [(GRPOConfig, {}), (GRPOPlusConfig, {}), (GRPOPlusConfig, {"advantage_estimator": "ema_task"})],
)
def test_a_judge_that_is_down_for_a_batch_ends_nothing(tmp_path, config_class, chosen):
    start = weights_of(make_trainer(tmp_path))
    judge = DownOnce(1)
    trainer, messages = trained(tmp_path, config_class=config_class, reward_funcs=[judge], max_steps=1, **chosen)
    assert len([message for message in messages if UNJUDGED in message]) == 1
    (log, _) = logs_of(trainer)
    assert log["grad_norm"] == 0.0
    assert log["reward"] is None
    assert log["advantages/frac_zero"] == 1.0
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(trainer).items())


def test_a_schedule_that_follows_an_evaluation_without_a_verdict_goes_on(tmp_path):
    def down_in_evaluation(completions: list[str], **_: Any) -> list[float | None]:
        return vowels(completions) if trainer.model.training else [None] * len(completions)

    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        reward_funcs=[down_in_evaluation],
        trainer_arguments={"eval_dataset": PROMPTS.select(range(2))},
        max_steps=2,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        metric_for_best_model="eval_reward",
        eval_strategy="steps",
        eval_steps=1,
    )
    with pytest.warns(UserWarning, match="No reward function judged"):
        trainer.train()
    assert not math.isnan(trainer.lr_scheduler.best)
    assert trainer.evaluate()["eval_reward"] is None


def test_an_evaluation_after_a_failed_training_says_none_as_trls_does(tmp_path):
    def fails_in_training(completions: list[str], **_: Any) -> list[None]:
        if trainer.model.training:
            raise KeyError("judge")
        return [None] * len(completions)

    data = {"eval_dataset": PROMPTS.select(range(2))}
    trainer = make_trainer(tmp_path, reward_funcs=[fails_in_training], trainer_arguments=data, **OURS)
    with pytest.raises(RuntimeError, match="judge"):
        trainer.train()
    with pytest.warns(UserWarning, match=UNJUDGED):
        assert trainer.evaluate()["eval_reward"] is None


def test_a_judge_that_is_down_in_the_evaluation_ends_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path,
        reward_funcs=[DownOnce(2)],
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        metric_for_best_model="eval_reward",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(2))},
        **OURS,
    )
    with pytest.warns(UserWarning, match=UNJUDGED):
        trainer.train()
    assert [entry["eval_reward"] for entry in logs_of(trainer) if "eval_reward" in entry] == [None]


@pytest.mark.parametrize("modifiers", [{}, {"gate": {"by": "first"}, "pods": {"keep": 2}}, {"difficulty": {}}])
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if not ESTIMATORS[name].needs_steps])
def test_a_batch_that_nobody_judged_has_advantages_of_zero_and_leaves_the_state(name, modifiers):
    rewards = Rewards(
        torch.full((2, 3, 2), torch.nan).double(),
        torch.ones(2).double(),
        ("first", "second"),
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        tasks=("a", "b"),
        prompts=("a", "b"),
    )
    assert set(modifiers) <= set(MODIFIERS)
    state: dict[str, Any] = {}
    advantages = estimate(name, rewards, {}, modifiers=modifiers, state=state)
    assert torch.equal(advantages, torch.zeros(2, 3, dtype=torch.float64))
    assert state == {}
    figures = advantage_metrics(rewards, advantages, limit=1.0)
    assert figures["frac_zero"] == figures["dead_groups"] == 1.0
    assert figures["length_correlation"] == figures["effective_samples"] == 0.0


class Raising(GRPOPlusTrainer):
    def advantage_metrics(self, rewards, advantages):
        raise ZeroDivisionError("a figure of mine")


class Odd(GRPOPlusTrainer):
    def advantage_metrics(self, rewards, advantages):
        return {"text": "high", "none": None, "list": [1.0], "nan": float("nan"), "tensor": torch.tensor(2.0), "one": 1}


class Nothing(GRPOPlusTrainer):
    def advantage_metrics(self, rewards, advantages):
        return None


@pytest.mark.parametrize(
    ("trainer_class", "expected", "said"),
    [
        (Raising, {}, ["advantage_metrics raised ZeroDivisionError: a figure of mine"]),
        (
            Odd,
            {"advantages/tensor": 2.0, "advantages/one": 1.0},
            [f"advantage_metrics, figure {name!r}, raised" for name in ("text", "none", "list")],
        ),
        (Nothing, {}, ["advantage_metrics raised AttributeError"]),
    ],
)
def test_a_figure_of_the_users_that_fails_is_left_out_with_one_warning(tmp_path, trainer_class, expected, said):
    trainer, messages = trained(tmp_path, trainer_class=trainer_class)
    assert trainer.state.global_step == 2
    log = logs_of(trainer)[0]
    assert {name: value for name, value in log.items() if name.startswith("advantages/")} == expected
    failed = [message for message in messages if "advantage_metrics" in message]
    assert len(failed) == len(said)
    assert all(start in message for start, message in zip(said, failed, strict=True))


def test_an_error_of_the_estimator_is_no_figure_and_still_ends_the_training(tmp_path):
    class Wrong(GRPOPlusTrainer):
        def estimate_advantages(self, rewards):
            raise ZeroDivisionError("not a figure")

    with pytest.raises(ZeroDivisionError, match="not a figure"):
        make_trainer(tmp_path, trainer_class=Wrong, config_class=GRPOPlusConfig).train()


@pytest.mark.parametrize("bar", [ArmBar("arm"), RewardsOnTheBar()], ids=["compare", "demo"])
def test_a_bar_shows_a_reward_of_none(bar):
    state = TrainerState(max_steps=2, is_world_process_zero=True)
    state.log_history = [{"reward": None, "rewards/correctness_reward/mean": None, "step": 1}]
    bar.on_train_begin(GRPOConfig, state, TrainerControl())
    bar.on_log(GRPOConfig, state, TrainerControl(), logs={})
    bar.on_train_end(GRPOConfig, state, TrainerControl())
