"""What every estimator promises, over the whole registry."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo_plus.advantages import ESTIMATORS, Rewards, estimate
from tests.close import assert_close

every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def promising(promise: str):
    return pytest.mark.parametrize("name", [name for name in ESTIMATORS if getattr(ESTIMATORS[name], promise)])


def rewards(values: Tensor) -> Rewards:
    values = values.float().double()
    functions = values.shape[2]
    return Rewards(values, torch.ones(functions).double(), tuple(f"reward_{k}" for k in range(functions)))


@st.composite
def tables(draw, min_generations: int = 1, abstentions: bool = True) -> Tensor:
    """(P, G, K) rewards with two decimals, some of them NaN: sizes 1 to 4, 1 to 9 and 1 to 3."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(min_generations, 9)), draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-200, 200, shape, generator=generator) / 100
    if abstentions:
        values[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.9]))] = torch.nan
    return values


@every_estimator
@given(values=tables())
def test_advantages_are_finite_and_zero_where_nothing_was_judged(name: str, values: Tensor):
    advantages = estimate(name, rewards(values))
    assert advantages.shape == values.shape[:2]
    assert advantages.isfinite().all()
    assert (advantages[values.isnan().all(-1)] == 0).all()


@every_estimator
@given(values=tables(), constant=st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 0.9, -1.3, 1e-8, 1e8]))
def test_a_constant_reward_gives_exactly_zero(name: str, values: Tensor, constant: float):
    # 0.7 in float32 has a std of 6e-8 over eight completions: frameworks divide by it and get |A| up to 0.9.
    constant_values = torch.full_like(values, constant).where(~values.isnan(), torch.nan)
    only_judged_alike = rewards(constant_values[..., :1])
    assert (estimate(name, only_judged_alike) == 0).all()


@every_estimator
def test_equal_totals_of_unequal_parts_give_zero_from_float32_noise(name: str):
    # 0.1 + 0.2 and 0.3 + 0 differ by one float32 rounding; with equal parts swapped no column is constant.
    if ESTIMATORS[name].multi_reward:
        pytest.skip("looks at the parts on purpose")
    values = torch.tensor([[[0.1, 0.2], [0.3, 0.0], [0.2, 0.1], [0.0, 0.3]]])
    assert (estimate(name, rewards(values)) == 0).all()


@every_estimator
@given(values=tables(), seed=st.integers(0, 1000))
def test_permuting_a_group_permutes_its_advantages(name: str, values: Tensor, seed: int):
    order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed))
    advantages = estimate(name, rewards(values))
    assert_close("permuted", estimate(name, rewards(values[:, order])), advantages[:, order], rtol=1e-9)


@promising("shift_invariant")
@given(values=tables(), shift=st.sampled_from([-3.0, 0.25, 10.0]))
def test_adding_a_constant_changes_nothing(name: str, values: Tensor, shift: float):
    # One column: a sum over columns of which some abstained moves by a different amount in each row.
    values = values[..., :1]
    advantages = estimate(name, rewards(values))
    assert_close("shifted", estimate(name, rewards(values + shift)), advantages, rtol=1e-4)


@promising("scale_invariant")
@given(values=tables())
def test_scaling_every_reward_changes_nothing(name: str, values: Tensor):
    keywords = {"eps": 0.0} if "eps" in ESTIMATORS[name].keywords else {}
    advantages = estimate(name, rewards(values), keywords)
    assert_close("scaled", estimate(name, rewards(values * 8), keywords), advantages, rtol=1e-9)


@promising("sums_to_zero")
@given(values=tables())
def test_a_group_sums_to_zero(name: str, values: Tensor):
    advantages = estimate(name, rewards(values))
    assert_close("sums", advantages.sum(-1), torch.zeros(len(values)), rtol=1e-9)


@every_estimator
@given(values=tables())
def test_one_group_does_not_see_another(name: str, values: Tensor):
    if ESTIMATORS[name].scope != "group":
        pytest.skip("uses a statistic of the batch")
    advantages = estimate(name, rewards(values))
    alone = torch.cat([estimate(name, rewards(group[None])) for group in values])
    assert_close("alone", alone, advantages, rtol=1e-12)


@every_estimator
@given(values=tables(), unscored=st.integers(0, 8))
def test_an_unjudged_completion_has_no_influence(name: str, values: Tensor, unscored: int):
    where = unscored % (values.shape[1] + 1)
    nobody = torch.full((values.shape[0], 1, values.shape[2]), torch.nan)
    longer = torch.cat([values[:, :where], nobody, values[:, where:]], dim=1)
    advantages = estimate(name, rewards(longer))
    kept = torch.cat([advantages[:, :where], advantages[:, where + 1 :]], dim=1)
    assert_close("others", kept, estimate(name, rewards(values)), rtol=1e-9)
    assert (advantages[:, where] == 0).all()
