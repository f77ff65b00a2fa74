import pytest
import torch

from grpo_plus.advantages import ESTIMATORS, Estimator, Rewards, estimate
from tests.advantages.cases import rewards_of


def returning(value) -> Estimator:
    return Estimator("mine", lambda rewards: value)


def test_a_wrong_shape_names_the_estimator_and_both_shapes():
    with pytest.raises(
        ValueError, match=r"'mine' returned \(2,\).*\(1, 2\) is needed.*group 0 were reward_0: \[0.0, 1"
    ):
        estimate(returning(torch.zeros(2)), rewards_of([[0, 1]]))


def test_another_type_is_named():
    with pytest.raises(ValueError, match="'mine' returned list"):
        estimate(returning([[0.0, 0.0]]), rewards_of([[0, 1]]))


def test_a_non_finite_advantage_names_group_completion_and_rewards():
    advantages = torch.tensor([[0.0, 0.0], [0.0, torch.nan]])
    with pytest.raises(ValueError, match=r"'mine' returned nan for completion 1 of group 1.*reward_0: \[3.0, 4.0\]"):
        estimate(returning(advantages), rewards_of([[1, 2], [3, 4]]))


def test_nan_is_zero_for_a_completion_that_nobody_judged():
    advantages = torch.tensor([[1.0, torch.nan, -1.0]])
    assert estimate(returning(advantages), rewards_of([[1, None, 0]])).tolist() == [[1.0, 0.0, -1.0]]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_infinite_reward_names_the_function(name):
    with pytest.raises(ValueError, match="reward function 'reward_1' returned inf for completion 0 of group 1"):
        estimate(name, rewards_of([[[0, 1], [1, 1]], [[0, float("inf")], [1, 1]]]))


def test_advantages_carry_no_gradient():
    advantages = torch.ones(1, 2, requires_grad=True) * 2
    assert not estimate(returning(advantages), rewards_of([[0, 1]])).requires_grad


def test_a_table_is_cut_into_groups_in_row_order():
    table = torch.arange(12, dtype=torch.float32).view(6, 2)
    rewards = Rewards.from_table(
        table, num_generations=3, weights=torch.tensor([1.0, 10.0]), names=("a", "b"), lengths=torch.arange(6)
    )
    assert rewards.total().tolist() == [[10.0, 32.0, 54.0], [76.0, 98.0, 120.0]]
    assert rewards.lengths is not None
    assert rewards.lengths.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_labels_come_per_row_and_are_kept_per_group():
    rows = {"tasks": ["x"] * 3 + ["y"] * 3, "prompts": ["p"] * 3 + ["q"] * 3}
    rewards = Rewards.from_table(torch.zeros(6, 1), num_generations=3, weights=torch.ones(1), names=("a",), **rows)
    assert (rewards.tasks, rewards.prompts) == (("x", "y"), ("p", "q"))


def test_an_incomplete_group_is_refused():
    with pytest.raises(ValueError, match="7 rows, which is not a multiple of the group size 3: group 2 has only 1"):
        Rewards.from_table(torch.zeros(7, 1), num_generations=3, weights=torch.ones(1), names=("a",))


def test_an_abstaining_function_adds_nothing_to_the_total():
    total = rewards_of([[[1, None], [None, None]]], weights=[2.0, 3.0]).total()
    assert total[0, 0] == 2.0
    assert total[0, 1].isnan()


@pytest.mark.parametrize(
    ("values", "weights", "names", "lengths", "message"),
    [
        (torch.zeros(2, 3), torch.ones(1), ("a",), None, r"Rewards.values has shape \(2, 3\)"),
        (torch.zeros(2, 3, 1), torch.ones(2), ("a",), None, "1 reward columns"),
        (torch.zeros(2, 3, 1), torch.ones(1), ("a", "b"), None, "2 names"),
        (torch.zeros(2, 3, 1), torch.ones(1), ("a",), torch.zeros(3), r"\(2, 3\) is needed"),
    ],
)
def test_inconsistent_rewards_are_refused(values, weights, names, lengths, message):
    with pytest.raises(ValueError, match=message):
        Rewards(values, weights, names, lengths)
