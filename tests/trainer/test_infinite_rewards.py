"""A reward that is infinite in float32, or whose squares are, is an error in every run, and names what returned it."""

import math

import pytest
import torch
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, Rewards
from grpo_plus.advantages import check_trls_range
from tests.training import brevity, make_trainer, weights_of


def made(output_dir, reward, config_class, **config):
    return make_trainer(
        output_dir, trainer_class=GRPOPlusTrainer, config_class=config_class, reward_funcs=[brevity, reward], **config
    )


def judged(values):
    """A reward function that gives the sixth completion of a batch one of these values, and the others 0 and 1."""

    def judge(completions, **_):
        rewards = [float(index % 2) for index in range(len(completions))]
        rewards[5] = values
        return rewards

    return judge


@pytest.mark.parametrize(
    ("value", "settings", "config_class"),
    [
        (math.inf, {}, GRPOConfig),
        (-math.inf, {}, GRPOPlusConfig),
        (1e39, {"scale_rewards": "none"}, GRPOConfig),
        (math.inf, {"scale_rewards": "batch"}, GRPOPlusConfig),
        (math.inf, {"multi_objective_aggregation": "normalize_then_sum"}, GRPOConfig),
        (1e39, {"advantage_estimator": "dr_grpo"}, GRPOPlusConfig),
    ],
)
def test_an_infinite_reward_is_refused_before_a_weight_moves(tmp_path, value, settings, config_class):
    trainer = made(tmp_path, judged(value), config_class, max_steps=1, **settings)
    before = weights_of(trainer)
    sign = "-" if value < 0 else ""
    with pytest.raises(ValueError, match=rf"reward function 'judge' returned {sign}inf for completion 1 of group 1, '"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_an_infinite_reward_is_refused_in_an_evaluation(tmp_path):
    trainer = made(tmp_path, judged(math.inf), GRPOConfig, per_device_eval_batch_size=8)
    with pytest.raises(ValueError, match="reward function 'judge' returned inf"):
        trainer.evaluate(trainer.train_dataset.select(range(2)))


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_completion_that_is_not_judged_is_no_error(tmp_path, value):
    trainer = made(tmp_path, judged(value), GRPOConfig, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_finite_reward_whose_square_is_infinite_is_refused_with_trls_advantages(tmp_path):
    # TRL would divide by an infinite standard deviation: the advantages of the whole group would be 0.
    trainer = made(tmp_path, judged(1e25), GRPOConfig, max_steps=1)
    with pytest.raises(ValueError, match=r"'judge' returned numbers as large as 1e\+25. With scale_rewards='group'"):
        trainer.train()
    made(tmp_path, judged(1e25), GRPOPlusConfig, max_steps=1, advantage_estimator="grpo").train()


def rewards(*columns, weights=None):
    """(P, G) per reward function."""
    values = torch.tensor(columns, dtype=torch.float64).permute(1, 2, 0)
    names = tuple("abc"[: len(columns)])
    return Rewards(values, torch.tensor(weights or [1.0] * len(columns), dtype=torch.float64), names)


LARGE = [[0.0, 1e20], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("columns", "weights", "scale", "aggregation", "refused"),
    [
        ([LARGE], None, "group", "sum_then_normalize", "'a'"),
        ([LARGE], None, "batch", "sum_then_normalize", "'a'"),
        ([LARGE], None, "group", "normalize_then_sum", "'a'"),
        ([LARGE], None, "none", "sum_then_normalize", None),  # nothing is squared
        ([LARGE], [1e-10], "group", "sum_then_normalize", None),
        ([LARGE], [1e-10], "group", "normalize_then_sum", "'a'"),  # normalized before it is weighted
        ([[[1e20, 1e20], [0.0, 1.0]]], None, "group", "sum_then_normalize", None),  # the same in the whole group
        ([[[1e20, 1e20], [0.0, 1.0]]], None, "batch", "sum_then_normalize", "'a'"),
        ([[[3e38, 3e38]]], None, "none", "sum_then_normalize", "'a'"),  # the mean sums first
        ([[[0.0, 1.0]], [[3e38, 0.0]], [[3e38, 0.0]]], None, "none", "sum_then_normalize", "'b'"),
        ([[[1e3, 1.0]]], [1e36], "none", "sum_then_normalize", "'a'"),
        ([[[math.nan, math.nan], [0.0, math.nan]]], None, "group", "sum_then_normalize", None),
        ([[[-1e18, 1e18]]], None, "group", "sum_then_normalize", None),
    ],
)
def test_what_overflows_in_trls_advantages_is_refused_and_nothing_else(columns, weights, scale, aggregation, refused):
    batch = rewards(*columns, weights=weights)
    if refused is None:
        check_trls_range(batch, scale, aggregation)
        return
    with pytest.raises(ValueError, match=refused):
        check_trls_range(batch, scale, aggregation)
