from dataclasses import replace

import pytest
import torch

from grpo_plus.advantages import Rewards, Steps, estimate
from grpo_plus.trainer.batches.refill_rows import (
    Padding,
    draw_prompts,
    fill,
    join_column,
    join_rewards,
    join_rows,
    rows_of,
    rows_of_process,
    without_spread,
)
from tests.advantages.cases import rewards_of


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


@pytest.mark.parametrize(
    ("dead", "live", "expected"),
    [
        # Slots 0 and 2 are dead; of the new groups 3 to 5 the first two live ones, 4 and 5, take them.
        (flags(1, 0, 1), flags(0, 1, 1), [4, 1, 5]),
        (flags(1, 1, 1), flags(0, 1, 0), [4, 1, 2]),
        (flags(0, 1, 0), flags(1, 1, 1), [0, 3, 2]),
        (flags(1, 0, 1), flags(0, 0, 0), [0, 1, 2]),
    ],
)
def test_dead_slots_take_the_first_live_groups(dead, live, expected):
    assert fill(dead, live).tolist() == expected


def test_a_process_takes_its_part_from_its_own_rows_and_everyones_new_ones():
    # Three groups of two rows on two processes of three rows: group 1 straddles them and is replaced by new group 2.
    rows = rows_of(torch.tensor([0, 5, 2]), 2)
    assert rows.tolist() == [0, 1, 10, 11, 4, 5]
    own = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    new = torch.tensor([6, 7, 8, 9, 10, 11])
    taken = [torch.cat([own[process], new])[rows_of_process(rows, process, 3)].tolist() for process in (0, 1)]
    assert taken == [[0, 1, 10], [11, 4, 5]]


def test_rows_are_filled_up_on_their_side():
    old, new = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7], [8, 9, 10]])
    rows = torch.tensor([2, 1])
    assert join_rows(old, new, rows, Padding("left", -1)).tolist() == [[5, 6, 7], [-1, 3, 4]]
    assert join_rows(new, old, rows, Padding("right", -1)).tolist() == [[1, 2, -1], [8, 9, 10]]
    assert join_rows(old[:, 0], new[:, 0], rows, None).tolist() == [5, 3]


def test_a_column_that_a_batch_lacks_is_empty_there():
    assert join_column([], ["c", "d"], torch.tensor([0, 3])) == [None, "d"]
    assert join_column(["a", "b"], ["c", "d"], torch.tensor([2, 1])) == ["c", "b"]


def test_rewards_move_with_their_group():
    def batch(values: list, tasks: tuple[str, ...]) -> Rewards:
        plain = rewards_of(values, lengths=[int(10 * values[0][0]) + 1, 2])
        return Rewards(plain.values, plain.weights, plain.names, plain.lengths, tasks, tuple(t.upper() for t in tasks))

    joined = join_rewards(
        batch([[1, 2], [3, 4]], ("a", "b")), batch([[5, 6], [7, 8]], ("c", "d")), torch.tensor([3, 1])
    )
    assert joined.values.squeeze(-1).tolist() == [[7, 8], [3, 4]]
    assert joined.lengths.tolist() == [[51, 2], [11, 2]]
    assert (joined.tasks, joined.prompts) == (("d", "b"), ("D", "B"))


def test_steps_move_with_their_completion():
    def batch(rewards: list, ends: list) -> Rewards:
        plain = rewards_of([[1, 0]], lengths=[9, 9])
        return replace(plain, steps=Steps.from_rows(rewards, ends, lengths=plain.lengths))

    old, new = batch([[1.0], [2.0]], [[3], [4]]), batch([[5.0, 6.0], []], [[1, 2], []])
    for groups, ends in (([0], [[[3, -1], [4, -1]]]), ([1], [[[1, 2], [-1, -1]]])):
        joined = join_rewards(old, new, torch.tensor(groups)).steps
        assert joined.ends.tolist() == ends
        assert (joined.rewards.isnan() == (joined.ends < 0)).all()
    without = join_rewards(replace(old, steps=None), new, torch.tensor([0])).steps
    assert without.ends.tolist() == [[[-1, -1], [-1, -1]]]
    assert join_rewards(replace(old, steps=None), replace(new, steps=None), torch.tensor([1])).steps is None


def test_turns_move_with_the_states_that_they_start_from():
    def batch(returned: list, states: list, rewards: list) -> Rewards:
        ends = [list(range(len(row))) for row in states]
        plain = rewards_of([returned], lengths=[9, 9])
        return replace(plain, steps=Steps.from_rows(rewards, ends, states, lengths=plain.lengths))

    old = batch([1, 0], [["a"], ["a"]], [None, None])
    new = batch([3, 1], [["b", "c"], ["b"]], [None, [1.0]])
    for groups, batches in (([0], [old]), ([1], [new]), ([0, 1], [old, new])):
        joined = join_rewards(old, new, torch.tensor(groups))
        expected = [estimate("turns", each) for each in batches]
        assert torch.equal(estimate("turns", joined), torch.cat(expected))


def test_no_prompt_is_drawn_twice_before_all_had_a_turn():
    first, second, third = draw_prompts("7 0 0", 5, 2, 3)
    assert len({*first, *second}) == 4
    assert {*first, *second, third[0]} == set(range(5))
    assert list(draw_prompts("7 0 0", 5, 2, 3)) == [first, second, third]
    assert list(draw_prompts("7 1 0", 50, 2, 3)) != list(draw_prompts("7 0 0", 50, 2, 3))


def test_groups_of_equal_rewards_and_groups_that_nobody_judged_are_without_spread():
    # In float32 the weighted sums of the first group differ by rounding.
    rewards = rewards_of([[[0.1, 0.2], [0.2, 0.1]], [[0.1, 0.2], [0.2, 0.2]], [[None, None], [None, None]]])
    assert without_spread(rewards).tolist() == [True, False, True]


def test_lengths_with_a_tool_are_known_where_only_one_of_the_batches_has_a_tool():
    plain = replace(rewards_of([[1, 1]]), lengths=torch.tensor([[3, 4]]))
    called = replace(plain, lengths=torch.tensor([[2, 2]]), full_lengths=torch.tensor([[5, 2]]))
    both = torch.tensor([0, 1])
    assert join_rewards(plain, called, both).spans.tolist() == [[3, 4], [5, 2]]
    assert join_rewards(called, plain, both).spans.tolist() == [[5, 2], [3, 4]]
    assert join_rewards(plain, plain, both).full_lengths is None
