from dataclasses import replace

import pytest
import torch

from grpo_plus.advantages import Rewards, Steps, metrics
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


def test_reward_shares_weigh_and_center():
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
    assert set(single) == {
        *("frac_zero", "dead_groups", "max_abs", "effective_samples", "zero_spread/correct", "zero_spread/total")
    }
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


def test_a_group_is_dead_where_every_advantage_is_zero():
    # Group 0 has no spread and trains, group 1 has some and does not.
    rewards = rewards_of([[0, 0], [1, 0]])
    advantages = torch.tensor([[-1.0, -1.0], [0.0, 0.0]])
    assert metrics.dead_groups(rewards, advantages) == 0.5
    assert metrics.dead_groups(rewards, advantages + 1e-9) == 0.0


def test_what_trl_leaves_of_rounding_does_not_make_a_group_live():
    rounding = torch.full((3, 2), 6e-4)
    assert metrics.dead_groups(rewards_of([[1, 1], [1, 0], [0, 0]]), rounding, rounded=True) == pytest.approx(2 / 3)
    # Parts that cancel train under normalize_then_sum, a part of weight 0 does not.
    rewards = rewards_of([[[1, 0], [0, 1]], [[1, 1], [1, 1]]])
    assert metrics.dead_groups(rewards, rounding[:2], rounded=True) == 1.0
    assert metrics.dead_groups(rewards, rounding[:2], rounded=True, normalizes_each=True) == 0.5
    unweighted = rewards_of([[[1, 0], [1, 1]], [[1, 1], [1, 1]]], [1.0, 0.0])
    assert metrics.dead_groups(unweighted, rounding[:2], rounded=True, normalizes_each=True) == 1.0


def test_zero_spread_is_a_share_of_the_groups_that_were_judged():
    rewards = rewards_of([[[1, None], [1, None]], [[1, 0], [0, 1]], [[1, 1], [0, 1]]])
    assert metrics.zero_spread(rewards) == pytest.approx({"correct": 1 / 3, "format": 1 / 2, "total": 2 / 3})
    assert metrics.zero_spread(rewards_of([[[1, None], [0, None]]])) == {"correct": 0.0, "total": 0.0}


def test_zero_spread_may_be_that_of_the_steps():
    lengths = torch.full((2, 2), 2)
    steps = Steps.from_rows([[1, 0], [1, 0], [1, 1], [1]], [[0, 1], [0, 1], [0, 1], [0]], lengths=lengths)
    rewards = replace(rewards_of([[[1, 3], [1, 4]], [[0, 3], [1, 3]]], [1.0, 0.0]), lengths=lengths, steps=steps)
    assert metrics.zero_spread(rewards) == {"correct": 0.5, "format": 0.5, "total": 0.5}
    # Of the steps the first group's differ, the second's do not; format has no weight and is only watched.
    watched = replace(rewards, values=torch.cat([rewards.values[..., :1], torch.ones(2, 2, 1)], -1))
    assert metrics.zero_spread(watched, by_steps=True) == {"correct": 0.5, "format": 1.0, "total": 0.5}
    flipped = replace(watched, steps=replace(steps, rewards=torch.ones(2, 2, 2).double()))
    assert metrics.zero_spread(flipped, by_steps=True)["correct"] == 1.0


def test_shares_of_rewards_that_are_normalized_do_not_depend_on_their_unit():
    # Centered: correct ±.5 in both groups, format ±50 in the first; z-scores are alike.
    rewards = rewards_of([[[1, 100], [0, 0]], [[1, 50], [0, 50]]])
    assert metrics.reward_shares(rewards)["format"] == pytest.approx(100 / 102)
    assert metrics.reward_shares(rewards, normalizes_each=True) == pytest.approx({"correct": 2 / 3, "format": 1 / 3})


def test_a_reward_of_weight_zero_has_no_share():
    rewards = rewards_of([[[1, 0, 7], [0, 1, 9]]], [1.0, 1.0, 0.0])
    assert metrics.reward_shares(rewards) == pytest.approx({"correct": 0.5, "format": 0.5})
    alone = metrics.advantage_metrics(rewards_of(VALUES, [1.0, 0.0]), torch.ones(3, 2))
    assert not [name for name in alone if name.startswith("reward_share") or name == "conflict"]


def test_the_limit_of_a_clip_may_differ_from_completion_to_completion():
    advantages = torch.tensor([[0.7, -0.3], [0.35, 0.3], [0.0, 0.0]]).double()
    limit = torch.tensor([[0.7], [0.35], [0.0]])
    metric = metrics.advantage_metrics(rewards_of([[1, 0]] * 3), advantages, limit=limit)
    assert metric["frac_clipped"] == pytest.approx(2 / 6)
