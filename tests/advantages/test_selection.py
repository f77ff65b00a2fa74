import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_plus.advantages import estimate
from grpo_plus.advantages.selection import pods
from tests.advantages.cases import rewards_of

PAPER = [0.9, 0.7, 0.4, 0.1, 0.5, 0.6, 0.8, 0.2]


@pytest.mark.parametrize(("keep", "kept"), [(4, {0, 3, 6, 7}), (3, {0, 3, 6}), (2, {0, 3}), (8, set(range(8)))])
def test_the_most_varied_rewards_are_kept(keep, kept):
    left = pods(rewards_of([PAPER]), keep=keep)
    assert set(left.judged[0].nonzero().flatten().tolist()) == kept


def test_the_dropped_completions_leave_the_statistics():
    # Kept: .9 .1 .8 .2, mean .5
    advantages = estimate("dr_grpo", rewards_of([PAPER]), modifiers={"pods": {"keep": 4}})
    assert advantages[0].tolist() == pytest.approx([0.4, 0, 0, -0.4, 0, 0, 0.3, -0.3], abs=1e-6)


@given(st.lists(st.integers(0, 20), min_size=3, max_size=8), st.integers(2, 6))
def test_no_other_choice_varies_more(values, keep):
    from itertools import combinations

    left = pods(rewards_of([[value / 4 for value in values]]), keep=keep)
    total = left.total()[0]
    kept = total[left.judged[0]]
    assert len(kept) == min(keep, len(values))
    choices = torch.tensor(list(combinations([value / 4 for value in values], len(kept))), dtype=torch.float64)
    assert kept.var(correction=0) >= choices.var(-1, correction=0).max() - 1e-9


def test_an_unjudged_completion_is_not_chosen():
    left = pods(rewards_of([[None, 1.0, 0.5, 0.0]]), keep=2)
    assert left.judged[0].tolist() == [False, True, False, True]


@pytest.mark.parametrize("keep", [1, 0, -3, 2.5])
def test_a_group_of_less_than_two_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep={keep} does not fit"):
        pods(rewards_of([PAPER]), keep=keep)
