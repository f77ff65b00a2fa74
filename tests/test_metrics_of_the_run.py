"""The numbers in the log describe what the run does: its estimator, its modifiers, TRL's normalization."""

from typing import Any

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, Rewards
from grpo_plus.advantages import estimate
from tests.close import rewards_tensor
from tests.training import brevity, make_trainer, stepwise, vowels

CANCEL = [[[1, 0], [0, 1]], [[1, 1], [1, 1]]]


def metrics_of(output_dir, values: list, weights: tuple[float, ...] = (1.0, 1.0), **settings: Any) -> dict[str, float]:
    """What GRPOPlusTrainer logs of a batch of these rewards of `vowels` and `brevity`."""
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    functions = (vowels, brevity)[: len(weights)]
    trainer = make_trainer(output_dir, reward_funcs=functions, num_generations=len(values[0]), **classes, **settings)
    names = ("vowels", "brevity")[: len(weights)]
    rewards = Rewards(rewards_tensor(values), torch.tensor(weights).double(), names)
    advantages = trainer.estimate_advantages(rewards)
    if advantages is None:
        advantages = estimate("grpo", rewards) + 1e-5  # as TRL's, with rounding
    return trainer.advantage_metrics(rewards, advantages)


@pytest.mark.parametrize(
    ("settings", "dead"),
    [
        ({"advantage_estimator": "grpo"}, 1.0),
        ({"advantage_estimator": "mo_grpo"}, 1.0),  # z-scores that cancel
        ({"advantage_estimator": "ngrpo", "advantage_kwargs": {"r_max": 3.0}}, 0.0),
        ({}, 1.0),
        ({"multi_objective_aggregation": "normalize_then_sum"}, 0.5),
    ],
)
def test_dead_groups_are_those_that_do_not_train(tmp_path, settings, dead):
    metric = metrics_of(tmp_path, CANCEL, **settings)
    assert metric["dead_groups"] == dead
    assert metric["zero_spread/total"] == 1.0


def test_a_group_whose_sums_tie_is_alive_where_the_parts_are_normalized(tmp_path):
    # Sums 1 and 1, but z-scores of opposite sign with weights 1 and .5.
    metric = metrics_of(tmp_path, [[[1, 0], [0, 2]]], (1.0, 0.5), advantage_estimator="gdpo")
    assert (metric["dead_groups"], metric["zero_spread/total"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"advantage_estimator": "grpo"}, 100 / 101),
        ({"advantage_estimator": "gdpo"}, 0.5),
        ({}, 100 / 101),
        ({"multi_objective_aggregation": "normalize_then_sum"}, 0.5),
    ],
)
def test_the_shares_are_those_of_what_is_summed(tmp_path, settings, share):
    metric = metrics_of(tmp_path, [[[1, 100], [0, 0]], [[1, 0], [0, 100]]], **settings)
    assert metric["reward_share/brevity"] == pytest.approx(share)


def test_the_metrics_describe_gated_rewards(tmp_path):
    # Nothing is correct: gated, the bonus differs nowhere.
    values = [[[0, 0.1], [0, 0.9]]]
    gate = {"gate": {"by": "vowels"}}
    assert metrics_of(tmp_path, values, advantage_estimator="dr_grpo")["zero_spread/brevity"] == 0.0
    gated = metrics_of(tmp_path, values, advantage_estimator="dr_grpo", advantage_modifiers=gate)
    assert gated["zero_spread/brevity"] == 1.0


def test_the_metrics_describe_the_completions_that_pods_kept(tmp_path):
    # 3, 0 and twice 1, of which one disagrees with its other reward; dropped, there is no conflict left.
    values = [[[3, 0], [0, 0], [1, 0.5], [1, 0.5]]]
    modifiers = {"pods": {"keep": 2}}
    assert metrics_of(tmp_path, values, advantage_estimator="dr_grpo")["conflict"] > 0
    kept = metrics_of(tmp_path, values, advantage_estimator="dr_grpo", advantage_modifiers=modifiers)
    assert kept["conflict"] == 0


@pytest.mark.parametrize("modifiers", [("clip", "difficulty"), ("difficulty", "clip"), ("clip",)])
def test_a_clipped_advantage_is_counted_whatever_later_modifiers_make_of_it(tmp_path, modifiers):
    # dr_grpo of 1, 0, 0, 0: .75, -.25 ...; the failing share is .75, so the limit of .5 becomes .375 after it.
    keywords = {"clip": {"max": 0.5}, "difficulty": {}}
    metric = metrics_of(
        tmp_path,
        [[1, 0, 0, 0]],
        (1.0,),
        advantage_estimator="dr_grpo",
        advantage_modifiers={name: keywords[name] for name in modifiers},
    )
    assert metric["frac_clipped"] == 0.25


def test_a_filtered_group_is_not_a_clipped_one(tmp_path):
    modifiers = {"clip": {"max": 0.5}, "filter_zero_std": {"by": "brevity"}}
    metric = metrics_of(
        tmp_path, [[[1, 0], [0, 0], [0, 0], [0, 0]]], advantage_estimator="dr_grpo", advantage_modifiers=modifiers
    )
    assert (metric["frac_clipped"], metric["dead_groups"]) == (0.0, 1.0)


def test_steps_decide_and_not_what_the_function_returned(tmp_path):
    def constant(completion_ids, log_extra, **_):
        return [0.0 for _ in stepwise(completion_ids, log_extra)]

    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        reward_funcs=[constant],
        advantage_estimator="process",
        max_steps=1,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/constant/std"] == 0.0
    assert logged["advantages/zero_spread/constant"] == logged["advantages/dead_groups"] == 0.0
