import pytest
import torch

from grpo_plus.advantages import Rewards
from grpo_plus.diagnostics import metrics
from tests.close import rewards_tensor


def rewards_of(values, weights=None, tasks=None, lengths=None) -> Rewards:
    tensor = rewards_tensor(values)
    functions = tensor.shape[2]
    weight = torch.tensor(weights or [1.0] * functions).double()
    names = ("correct", "format", "style")[:functions]
    lengths = None if lengths is None else torch.tensor(lengths)
    return Rewards(tensor, weight, names, lengths=lengths, tasks=tasks)


# Group 0: correct differs, format does not. Group 1: format differs, against correct. Group 2: dead.
VALUES = [[[1, 1], [0, 1]], [[1, 0], [0, 1]], [[1, 1], [1, 1]]]


def test_zero_spread_counts_groups_per_function():
    # totals: (2, 1), (1, 1), (2, 2)
    shares = metrics.zero_spread(rewards_of(VALUES))
    assert shares == pytest.approx({"correct": 1 / 3, "format": 2 / 3, "total": 2 / 3})


def test_reward_shares_weigh_and_centre():
    # |c|: correct .5 x 4 = 2; format .5 x 2 x weight 3 = 3
    assert metrics.reward_shares(rewards_of(VALUES, [1.0, 3.0])) == pytest.approx({"correct": 0.4, "format": 0.6})


def test_conflict_counts_completions_pulled_both_ways():
    assert metrics.conflict(rewards_of(VALUES)) == pytest.approx(2 / 6)


def test_an_unjudged_completion_does_not_count_in_conflict():
    values = [[[1, 0], [0, 1], [None, None]]]
    assert metrics.conflict(rewards_of(values)) == pytest.approx(1.0)


def test_task_shares_sum_over_prompts():
    advantages = torch.tensor([[1.0, -1.0], [3.0, -3.0], [0.0, 0.0]])
    assert metrics.task_shares(("sum", "sort", "sum"), advantages) == pytest.approx({"sort": 0.75, "sum": 0.25})


@pytest.mark.parametrize(
    ("advantages", "share"),
    [
        ([[1.0, -1.0, 1.0, -1.0]], 1.0),
        ([[4.0, 0.0, 0.0, 0.0]], 0.25),
        ([[3.0, -1.0, 0.0, 0.0]], 0.4),  # 16 / 10 / 4
        ([[0.0, 0.0]], 0.0),
    ],
)
def test_effective_samples(advantages, share):
    assert metrics.effective_samples(torch.tensor(advantages)) == pytest.approx(share)


def test_length_correlation_has_a_sign_and_skips_the_unjudged():
    advantages = torch.tensor([[1.0, 0.0, -1.0, 0.0]]).double()
    judged = torch.tensor([[True, True, True, False]])
    assert metrics.correlation(advantages, torch.tensor([[30, 20, 10, 999]]), judged) == pytest.approx(1.0)
    assert metrics.correlation(advantages, torch.tensor([[10, 20, 30, 999]]), judged) == pytest.approx(-1.0)
    assert metrics.correlation(advantages, torch.tensor([[10, 10, 10, 999]]), judged) == 0.0


def test_clipped_advantages_are_counted_in_float32():
    advantages = torch.tensor([[0.7, -0.7, 0.69, 0.0]]).double()  # 0.7 in float32 is 0.699999988
    metric = metrics.advantage_metrics(rewards_of([[1, 0, 0, 0]]), advantages, limit=0.7)
    assert metric["frac_clipped"] == 0.5


def test_what_a_batch_cannot_tell_is_left_out():
    single = metrics.advantage_metrics(rewards_of([[1, 0]]), torch.tensor([[0.5, -0.5]]))
    assert set(single) == {"frac_zero", "max_abs", "effective_samples", "zero_spread/correct", "zero_spread/total"}
    several = metrics.advantage_metrics(
        rewards_of(VALUES, tasks=("a", "b", "a"), lengths=[[1, 2], [3, 4], [5, 6]]),
        torch.tensor([[0.5, -0.5], [0.0, 0.0], [0.0, 0.0]]).double(),
    )
    assert several["frac_zero"] == pytest.approx(4 / 6)
    assert several["max_abs"] == 0.5
    assert several["task_share/a"] == pytest.approx(1.0)
    # Σ A (L − 3.5) = .5·(−2.5) − .5·(−1.5) = −.5; √(ΣA² · Σ(L − 3.5)²) = √(.5 · 17.5)
    assert several["length_correlation"] == pytest.approx(-0.5 / (0.5 * 17.5) ** 0.5)


def test_the_length_of_a_completion_that_nobody_judged_does_not_count():
    rewards = rewards_of([[3, 2, 1, None]], lengths=[[30, 20, 10, 999]])
    metric = metrics.advantage_metrics(rewards, torch.tensor([[1.0, 0.0, -1.0, 0.0]]).double())
    assert metric["length_correlation"] == pytest.approx(1.0)
