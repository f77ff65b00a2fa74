"""Hyper-parameters of estimators: where they are another estimator, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given

from grpo_plus.advantages import ESTIMATORS, Estimator, Rewards, UnknownRewardError, check_keywords, estimate
from tests.advantages.cases import rewards_of
from tests.advantages.test_properties import batches, fit
from tests.close import assert_close


@pytest.mark.parametrize(
    ("name", "keywords", "equal_to", "other_keywords"),
    [
        ("passk", {"k": 1, "eps": 0.0}, "grpo_pop", {}),
        ("pkpo", {"k": 1}, "rloo", {}),
        ("mo_grpo", {"eps": 0.0}, "grpo", {"eps": 0.0}),
        ("dvao", {}, "grpo", {}),
        ("sa_mrpo", {"gamma": 0.0}, "gdpo", {}),
        ("gd2po", {"tau": 0.0}, "gdpo", {}),
    ],
)
@given(rewards=batches())
def test_a_special_case_is_another_estimator(
    name: str, keywords: dict[str, Any], equal_to: str, other_keywords: dict[str, Any], rewards: Rewards
):
    rewards = fit("passk", rewards)
    assert_close(
        "special case", estimate(name, rewards, keywords), estimate(equal_to, rewards, other_keywords), rtol=1e-12
    )


@given(rewards=batches())
def test_equal_lengths_make_opo_dr_grpo(rewards: Rewards):
    rewards = replace(rewards, lengths=torch.full_like(rewards.values[..., 0], 7))
    assert_close("opo", estimate("opo", rewards), estimate("dr_grpo", rewards), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("passk", {"k": 0}, "k=0 is not a number of attempts"),
        ("pkpo", {"k": 2.5}, "k=2.5 is not a number of attempts"),
        ("passk", {"k": 5}, r"passk draws k=5 .* there are 3 \(num_generations"),
        ("pkpo", {"k": 4}, r"pkpo draws k=4 .* there are 3 \(num_generations"),
        ("quantile", {"level": 1.0}, r"level=1\.0 is not a quantile"),
        ("bnpo_advantage", {"low": 1.0}, r"low=1\.0 and high=1\.0 bound no rewards"),
        ("bnpo_advantage", {"high": 0.5}, r"from low=0\.0 to high=0\.5, .* takes the values 0\.0, 1\.0"),
        ("grpo", {"ddof": 2}, "ddof=2 is not a standard deviation"),
        ("maxrl", {"eps": -1.0}, r"eps=-1\.0 is negative"),
        ("grpo", {"eps": float("nan")}, "eps=nan is negative"),
        ("loo_std", {"eps": -1.0}, r"eps=-1\.0 is negative"),
        ("popart", {"eps": -1.0}, r"eps=-1\.0 is negative"),
        ("ema_task", {"max_abs": 0.0}, r"max_abs=0\.0 would send every group"),
        ("ema_task", {"max_abs": float("nan")}, "max_abs=nan would send every group"),
        ("spo", {"strength": 0.0}, r"strength=0\.0 is no number of completions"),
        ("spo", {"strength": -8.0}, r"strength=-8\.0 is no number of completions"),
        ("reinforce_pp_baseline", {"weight": "tokens"}, "weight='tokens' is not a choice. Did you mean 'token'"),
        ("gdpo", {"batch_over": "alive"}, "batch_over='alive' is not a choice. Did you mean 'live'"),
        ("gd2po", {"tau": 1.5}, r"tau=1\.5 is no share of agreement"),
        ("gd2po", {"tau": float("nan")}, "tau=nan is no share of agreement"),
        ("sa_mrpo", {"gamma": -1}, "gamma=-1 is negative"),
        ("sa_mrpo", {"bounds": {"reward_1": [0, 1]}}, "There is no reward 'reward_1'. Did you mean 'reward_0'"),
        ("sa_mrpo", {"bounds": {"reward_0": [1, 1]}}, r"bounds\['reward_0'\]=\[1, 1\] bounds nothing"),
    ],
)
def test_a_keyword_out_of_range_is_named(name: str, keywords: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        estimate(name, rewards_of([[0, 1, 1]]), keywords)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_defaults_pass_the_check_of_every_estimator(name: str):
    check_keywords(ESTIMATORS[name], {})
    names = ["correctness"] if ESTIMATORS[name].needs_steps else ["correctness", "length"]
    check_keywords(ESTIMATORS[name], {}, num_generations=7, names=names)


def test_functions_of_weight_zero_do_not_count_in_the_check():
    names = ["steps", "watched"]
    check_keywords(ESTIMATORS["process"], {}, names=names, weights=[2.0, 0.0])
    check_keywords(ESTIMATORS["process"], {}, names=names, weights=[0.0, 0.0])
    with pytest.raises(ValueError, match="'steps', 'watched' would not all have an effect"):
        check_keywords(ESTIMATORS["process"], {}, names=names, weights=[2.0, 1.0])


def test_the_check_tries_rewards_that_the_keywords_allow():
    check_keywords(ESTIMATORS["bnpo_advantage"], {"low": 2.0, "high": 5.0})
    check_keywords(ESTIMATORS["sa_mrpo"], {"bounds": {"correctness": [0, 2], "length": [-1, 0]}})
    check_keywords(ESTIMATORS["passk"], {"k": 4}, num_generations=4)


@pytest.mark.parametrize(
    ("name", "keywords", "options", "message"),
    [
        ("grpo", {"epsilon": 1e-6}, {}, "'grpo' takes no keyword 'epsilon'. Did you mean 'eps'"),
        ("grpo", {"eps": "small"}, {}, "eps='small' must be a number"),
        ("passk", {"k": 4}, {}, "k=4 .* there are 2"),
        ("bnpo_advantage", {"low": 2.0, "high": 1.0}, {}, "bound no rewards"),
        ("bnpo_advantage", {"low": "zero"}, {}, "low='zero' must be a number"),
        ("sa_mrpo", {"bounds": {"correctness": 2}}, {}, "has no len"),
        ("sa_mrpo", {"bounds": {"corectness": [0, 2]}}, {"names": ["correctness"]}, "Did you mean 'correctness'"),
    ],
)
def test_the_check_refuses(name: str, keywords: dict[str, Any], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        check_keywords(ESTIMATORS[name], keywords, **options)
    assert isinstance(error.value, UnknownRewardError) == bool(options)


def test_a_function_of_the_users_is_not_tried():
    def mine(rewards: Rewards, *, temperature: float) -> torch.Tensor:
        raise AssertionError

    check_keywords(Estimator("mine", mine), {"temperature": 1.0})
    with pytest.raises(ValueError, match="takes no keyword 'temprature'"):
        check_keywords(Estimator("mine", mine), {"temprature": 1.0})
