"""What every estimator promises, over the whole registry."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo_plus.advantages import ESTIMATORS, Rewards, estimate
from tests.advantages.cases import rewards_of
from tests.close import assert_close

every_estimator = pytest.mark.parametrize("name", [name for name in ESTIMATORS if not ESTIMATORS[name].needs_steps])
CONSTANTS = {
    "real": [0.0, 0.1, 0.2, 0.3, 0.7, 0.9, -1.3, 1e-8, 1e8],
    "unit": [0.0, 0.1, 0.2, 0.3, 0.7, 0.9, 1.0],
    "binary": [0.0, 1.0],
}


def which(**promises: Any):
    """Parametrizes over the estimators that declare this; those of steps have tests of their own."""
    promises = {"needs_steps": False, **promises}
    names = [
        name
        for name in ESTIMATORS
        if all(getattr(ESTIMATORS[name], promise) == value for promise, value in promises.items())
    ]
    return pytest.mark.parametrize("name", names)


def advantages_of(name: str, rewards: Rewards, **keywords: Any) -> Tensor:
    """With at most one attempt for a group of one: k = 2 does not fit there."""
    if "k" in ESTIMATORS[name].keywords:
        keywords["k"] = min(2, rewards.values.shape[1])
    return estimate(name, rewards, keywords)


@st.composite
def batches(draw) -> Rewards:
    """Rewards with two decimals, some of them NaN: 1 to 4 groups of 1 to 9, 1 to 3 functions; lengths 0 to 50."""
    prompts, generations, functions = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-200, 200, (prompts, generations, functions), generator=generator) / 100
    values[torch.rand(values.shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.9]))] = torch.nan
    lengths = torch.randint(0, 50, (prompts, generations), generator=generator)
    return as_rewards(values, lengths)


def as_rewards(values: Tensor, lengths: Tensor | None = None) -> Rewards:
    """As TRL hands them over: values of float32, here in double precision."""
    names = tuple(f"reward_{k}" for k in range(values.shape[2]))
    lengths = torch.ones(values.shape[:2]) if lengths is None else lengths
    return Rewards(values.float().double(), torch.ones(len(names)).double(), names, lengths)


def fit(name: str, rewards: Rewards) -> Rewards:
    """The same rewards, mapped to where the estimator is defined."""
    domain = ESTIMATORS[name].domain
    if domain == "real":
        return rewards
    values = rewards.values[..., :1]
    values = (values + 2) / 4 if domain == "unit" else (values > 0).double().where(~values.isnan(), torch.nan)
    return as_rewards(values, rewards.lengths)


def select(rewards: Rewards, groups: Any = slice(None), completions: Any = slice(None)) -> Rewards:
    assert rewards.lengths is not None
    return replace(
        rewards, values=rewards.values[groups][:, completions], lengths=rewards.lengths[groups][:, completions]
    )


def joined(first: Rewards, second: Rewards, dim: int) -> Rewards:
    assert first.lengths is not None
    assert second.lengths is not None
    return replace(
        first,
        values=torch.cat([first.values, second.values], dim),
        lengths=torch.cat([first.lengths, second.lengths], dim),
    )


@every_estimator
@given(rewards=batches())
def test_advantages_are_finite_and_zero_where_nothing_was_judged(name: str, rewards: Rewards):
    rewards = fit(name, rewards)
    advantages = advantages_of(name, rewards)
    assert advantages.shape == rewards.values.shape[:2]
    assert advantages.isfinite().all()
    assert (advantages[~rewards.judged] == 0).all()


@every_estimator
@given(rewards=batches(), data=st.data())
def test_a_constant_reward_gives_exactly_zero(name: str, rewards: Rewards, data: st.DataObject):
    # 0.7 in float32 has a std of 6e-8 over eight completions: frameworks divide by it and get |A| up to 0.9.
    estimator = ESTIMATORS[name]
    constant = 1.0 if estimator.trains_without_spread else data.draw(st.sampled_from(CONSTANTS[estimator.domain]))
    values = torch.full_like(rewards.values, constant).where(~rewards.values.isnan(), torch.nan)[..., :1]
    assert (advantages_of(name, as_rewards(values, rewards.lengths)) == 0).all()


@which(trains_without_spread=False)
@given(rewards=batches(), data=st.data())
def test_a_dead_group_beside_live_ones_gets_exactly_zero(name: str, rewards: Rewards, data: st.DataObject):
    constant = data.draw(st.sampled_from(CONSTANTS[ESTIMATORS[name].domain]))
    live = fit(name, rewards)
    dead = select(live, slice(0, 1))
    # Every function has its own constant.
    constants = constant * (1 + torch.arange(live.values.shape[2]))
    dead = replace(dead, values=constants.expand_as(dead.values).float().double())
    assert (advantages_of(name, joined(live, dead, 0))[-1] == 0).all()


@which(trains_without_spread=True)
def test_a_dead_group_trains_where_that_is_declared(name: str):
    rewards = replace(rewards_of([[1, 0, 0], [0, 0, 0]]), lengths=torch.tensor([[30, 10, 10], [10, 10, 10]]))
    assert (estimate(name, rewards)[1] != 0).all()


@which(multi_reward=False, domain="real", trains_without_spread=False)
def test_equal_totals_of_unequal_parts_give_zero_from_float32_noise(name: str):
    # 0.1 + 0.2 and 0.3 + 0 differ by one float32 rounding; with equal parts swapped no column is constant.
    values = torch.tensor([[[0.1, 0.2], [0.3, 0.0], [0.2, 0.1], [0.0, 0.3]]])
    assert (estimate(name, as_rewards(values)) == 0).all()


@which(multi_reward=False, domain="real")
def test_parts_that_cancel_give_zero_from_float32_noise(name: str):
    # 0.1 + 0.2 - 0.3 is -7e-9 in float32, and would be a spread beside 0 + 0 - 0.
    values = torch.tensor([[[0.1, 0.2, -0.3], [0.0, 0.0, 0.0], [0.2, 0.1, -0.3], [0.0, 0.0, 0.0]]])
    keywords = {"r_max": 0.0} if name == "ngrpo" else {}
    assert (estimate(name, as_rewards(values), keywords) == 0).all()


@every_estimator
@given(rewards=batches(), seed=st.integers(0, 1000))
def test_permuting_a_group_permutes_its_advantages(name: str, rewards: Rewards, seed: int):
    rewards = fit(name, rewards)
    order = torch.randperm(rewards.values.shape[1], generator=torch.Generator().manual_seed(seed))
    advantages = advantages_of(name, rewards)
    permuted = advantages_of(name, select(rewards, completions=order))
    assert_close("permuted", permuted, advantages[:, order], rtol=1e-9)


@which(shift_invariant=True)
@given(rewards=batches(), shift=st.sampled_from([-3.0, 0.25, 10.0]))
def test_adding_a_constant_changes_nothing(name: str, rewards: Rewards, shift: float):
    # One column: a sum over columns of which some abstained moves by a different amount in each row.
    rewards = as_rewards(rewards.values[..., :1], rewards.lengths)
    shifted = as_rewards(rewards.values + shift, rewards.lengths)
    assert_close("shifted", advantages_of(name, shifted), advantages_of(name, rewards), rtol=1e-4)


@which(scale_invariant=True)
@given(rewards=batches())
def test_scaling_every_reward_changes_nothing(name: str, rewards: Rewards):
    keywords = {"eps": 0.0} if "eps" in ESTIMATORS[name].keywords else {}
    scaled = replace(rewards, values=rewards.values * 8)
    assert_close("scaled", advantages_of(name, scaled, **keywords), advantages_of(name, rewards, **keywords), rtol=1e-9)


@which(normalizes_each=True)
@given(rewards=batches())
def test_the_unit_of_one_reward_changes_nothing(name: str, rewards: Rewards):
    keywords = {"eps": 0.0} | ({"gamma": 0.0} if name == "sa_mrpo" else {})
    scaled = rewards.values.clone()
    scaled[..., 0] *= 8
    assert_close(
        "scaled",
        estimate(name, replace(rewards, values=scaled), keywords),
        estimate(name, rewards, keywords),
        rtol=1e-9,
    )


@which(normalizes_each=False, multi_reward=True)
def test_the_unit_of_one_reward_matters_elsewhere(name: str):
    rewards = rewards_of([[[1, 0], [0, 1], [0, 0.3]]])
    scaled = replace(rewards, values=rewards.values * torch.tensor([8.0, 1.0]))
    assert (estimate(name, scaled) - estimate(name, rewards)).abs().max() > 0.1


@which(sums_to_zero=True)
@given(rewards=batches())
def test_a_group_sums_to_zero(name: str, rewards: Rewards):
    sums = advantages_of(name, fit(name, rewards)).sum(-1)
    assert_close("sums", sums, torch.zeros_like(sums), rtol=1e-9)


@which(scope="group")
@given(rewards=batches())
def test_one_group_does_not_see_another(name: str, rewards: Rewards):
    rewards = fit(name, rewards)
    groups = [select(rewards, slice(prompt, prompt + 1)) for prompt in range(len(rewards.values))]
    alone = torch.cat([advantages_of(name, group) for group in groups])
    assert_close("alone", alone, advantages_of(name, rewards), rtol=1e-12)


@every_estimator
@given(rewards=batches(), unjudged=st.integers(0, 9))
def test_an_unjudged_completion_has_no_influence(name: str, rewards: Rewards, unjudged: int):
    rewards = fit(name, rewards)
    where = unjudged % (rewards.values.shape[1] + 1)
    nobody = select(rewards, completions=slice(0, 1))
    nobody = replace(nobody, values=torch.full_like(nobody.values, torch.nan))
    before, after = select(rewards, completions=slice(0, where)), select(rewards, completions=slice(where, None))
    advantages = advantages_of(name, joined(joined(before, nobody, 1), after, 1))
    kept = torch.cat([advantages[:, :where], advantages[:, where + 1 :]], dim=1)
    assert_close("others", kept, advantages_of(name, rewards), rtol=1e-9)
    assert (advantages[:, where] == 0).all()


@every_estimator
def test_lengths_matter_only_where_declared(name: str):
    rewards = rewards_of([[1, 0, 0, 1], [0, 1, 1, 1]])
    unequal = replace(rewards, lengths=torch.tensor([[1, 2, 3, 40], [5, 6, 7, 8]]))
    changes = not torch.equal(estimate(name, unequal), estimate(name, rewards))
    assert changes == ESTIMATORS[name].needs_lengths


@which(needs_lengths=True)
def test_unknown_lengths_are_refused(name: str):
    with pytest.raises(ValueError, match="lengths of the completions are needed"):
        estimate(name, replace(rewards_of([[1, 0]]), lengths=None))


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if ESTIMATORS[name].domain != "real"])
def test_a_bound_that_is_missed_by_float32_rounding_counts_as_met(name: str):
    # 0.4 + 0.6 is 1.00000003
    in_parts = estimate(name, rewards_of([[[0.4, 0.6], [0.4, 0.6]], [[0.4, 0.6], [0, 0]]]))
    assert_close("advantages", in_parts, estimate(name, rewards_of([[1, 1], [1, 0]])), rtol=1e-6)


@given(lengths=st.sampled_from([[0, 0], [0, 5]]))
@which(needs_lengths=True)
def test_empty_completions_are_no_division_by_zero(name: str, lengths: list[int]):
    rewards = replace(rewards_of([[1, 0], [0, 0]]), lengths=torch.tensor([lengths] * 2))
    assert estimate(name, rewards).isfinite().all()


@which(domain="binary")
@pytest.mark.parametrize("odd", [0.5, 2.0, -1.0])
def test_a_reward_that_is_not_binary_is_named(name: str, odd: float):
    values = ", ".join(map(str, sorted([odd, 1.0])))
    with pytest.raises(ValueError, match=f"weighted sum of 'reward_0', 'reward_1' takes the values {values}"):
        estimate(name, rewards_of([[[1, 0], [odd, 0], [None, None]]]))
