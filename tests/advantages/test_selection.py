import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_plus.advantages import estimate
from grpo_plus.advantages.selection import gfpo, pods
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
@pytest.mark.parametrize("select", [pods, gfpo])
def test_a_group_of_less_than_two_is_refused(select, keep):
    with pytest.raises(ValueError, match=f"keep={keep} does not fit"):
        select(rewards_of([PAPER]), keep=keep)


def test_gfpo_keeps_the_shortest_or_what_earns_most_per_token():
    # Rewards per token: .09, .035, .01333, .0025, .025, .1, .0267, .0067
    rewards = rewards_of([PAPER], lengths=[10, 20, 30, 40, 20, 6, 30, 30])
    assert gfpo(rewards, keep=3).judged[0].nonzero().flatten().tolist() == [0, 1, 5]  # of two with 20 the first
    efficient = gfpo(rewards, keep=4, metric="token_efficiency")
    assert efficient.judged[0].nonzero().flatten().tolist() == [0, 1, 5, 6]
    assert gfpo(rewards, keep=9).judged.all()


def test_gfpo_passes_over_unjudged_completions_and_names_a_wrong_metric():
    rewards = rewards_of([[None, 1.0, 0.5, -1.0]], lengths=[1, 4, 3, 2])
    assert gfpo(rewards, keep=2).judged[0].tolist() == [False, False, True, True]
    assert gfpo(rewards, keep=2, metric="token_efficiency").judged[0].tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="metric='lenght' is not a choice. Did you mean 'length'"):
        gfpo(rewards, keep=2, metric="lenght")


def test_gfpo_with_grpo_has_the_advantages_of_trls_removed_trainer():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 8, generator=generator).round(decimals=2)
    lengths = torch.randperm(8, generator=generator) + 5
    advantages = estimate(
        "grpo", rewards_of(values.tolist(), lengths=lengths.tolist()), modifiers={"gfpo": {"keep": 4}}
    )
    # The trainer: the top `num_remains_in_group` by the scores of the filter, then mean, std and eps of the kept.
    kept = torch.topk(-lengths.float(), 4).indices
    rest = values[:, kept].double()
    expected = torch.zeros(3, 8, dtype=torch.float64)
    expected[:, kept] = (rest - rest.mean(1, keepdim=True)) / (rest.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)
