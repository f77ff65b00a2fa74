"""Reward weights that change over the run."""

import re
from typing import Any

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import UnknownRewardError
from grpo_plus.advantages.schedule import check_schedule, weight_at
from tests.close import differing
from tests.training import PROMPTS, brevity, make_trainer, vowels, weights_of


def one(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def hundred(completions: list[str], **_: Any) -> list[float]:
    return [100.0] * len(completions)


def made(folder, **settings: Any) -> GRPOPlusTrainer:
    settings = {"reward_funcs": (one, hundred), "max_steps": 4} | settings
    return make_trainer(folder, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, **settings)


def logged(trainer: GRPOPlusTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_weight_is_linear_between_points_at_equal_distances():
    assert [weight_at([1.0, 0.0], share) for share in (0, 0.25, 1)] == [1.0, 0.75, 0.0]
    # Points at 0, 1/2 and 1
    assert [weight_at([0.0, 1.0, 3.0], share) for share in (-1, 0.25, 0.5, 0.75, 1, 2)] == [0, 0.5, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1.0], r"reward_weight_schedule\['form'\]=\[1.0\] is no list of two or more weights. Write"),
        (1.0, r"reward_weight_schedule\['form'\]=1.0 is no list of two"),
        ([1.0, float("nan")], r"reward_weight_schedule\['form'\]\[1\]=nan is no weight"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(points, message):
    with pytest.raises(ValueError, match=message):
        check_schedule({"form": points})


def test_the_configuration_takes_json_and_the_trainer_names_an_unknown_reward(tmp_path):
    config = GRPOPlusConfig("out", use_cpu=True, bf16=False, reward_weight_schedule='{"on": ["1e0", 0.5]}')
    assert config.reward_weight_schedule == {"on": [1.0, 0.5]}
    with pytest.raises(UnknownRewardError, match=re.escape("no reward 'on'. Did you mean 'one'")):
        made(tmp_path, reward_weight_schedule={"on": [1.0, 0.5]})


@pytest.mark.parametrize("estimator", [None, "grpo"])
def test_trls_log_follows_the_weights_and_a_resumed_run_goes_on_with_them(tmp_path, estimator):
    settings: dict[str, Any] = {
        "advantage_estimator": estimator,
        "reward_weights": [7.0, 0.01],
        "reward_weight_schedule": {"one": [1.0, 0.0]},
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = made(tmp_path / "run", **settings)
    whole.train()
    # One starts at 1 and loses a quarter per step; a hundred counts as 1 throughout.
    assert logged(whole, "reward") == pytest.approx([2.0, 1.75, 1.5, 1.25])
    assert logged(whole, "reward_weights/one") == [1.0, 0.75, 0.5, 0.25]
    assert not logged(whole, "reward_weights/hundred")
    resumed = made(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "reward") == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_a_schedule_that_stays_trains_as_fixed_weights_do(tmp_path):
    def trained(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        rewards = {"reward_funcs": (vowels, brevity), "max_steps": 2, "advantage_estimator": "dr_grpo"}
        trainer = made(tmp_path / name, **rewards, **settings)
        trainer.train()
        return weights_of(trainer)

    fixed = trained("fixed", reward_weights=[0.3, 1.0])
    assert differing(trained("stays", reward_weight_schedule={"vowels": [0.3, 0.3]}), fixed) == []
    assert differing(trained("moves", reward_weight_schedule={"vowels": [0.3, -3.0]}), fixed)


def test_evaluations_have_the_last_weights_and_the_record_the_first(tmp_path):
    trainer = made(
        tmp_path,
        reward_weight_schedule={"one": [1.0, 5.0]},
        reward_weights=[1.0, 0.0],
        max_steps=1,
        per_device_eval_batch_size=4,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(1))},
    )
    assert trainer.evaluate()["eval_reward"] == pytest.approx(5.0)
    trainer.train()
    assert logged(trainer, "reward") == [1.0]
    assert '"one": 1.0' in (tmp_path / "grpo_plus_run.json").read_text()
    assert trainer.evaluate()["eval_reward"] == pytest.approx(5.0)


def test_a_reward_that_begins_at_zero_counts_for_the_health_warnings(tmp_path):
    trainer = made(tmp_path, reward_weight_schedule={"one": [0.0, 0.5], "hundred": [-1.0, 0.25]})
    assert trainer._reward_weights.largest == [0.5, -1.0]


def test_the_functions_of_evaluations_keep_their_weights(tmp_path):
    trainer = made(
        tmp_path,
        reward_weight_schedule={"one": [1.0, 5.0]},
        max_steps=1,
        per_device_eval_batch_size=4,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(1)), "eval_reward_funcs": [hundred]},
    )
    assert trainer.evaluate()["eval_reward"] == pytest.approx(100.0)
    trainer.train()
    assert logged(trainer, "reward") == [101.0]
