from dataclasses import replace

import pytest
import torch

from grpo_plus.advantages import Rewards, Steps, checked, estimate, process_advantages
from grpo_plus.advantages.modifiers import apply_to_advantages
from tests.advantages.cases import rewards_of
from tests.close import assert_close

NAN = float("nan")


def test_a_token_collects_its_own_step_and_the_later_ones():
    # Steps 1, 0 and 0, 0, 1: mean .4, population std √.24, so 1 scores 1.224745 and 0 scores -.816497.
    advantages = process_advantages(
        torch.tensor([[1.0, 0.0, NAN], [0.0, 0.0, 1.0]]),
        torch.tensor([[1, 2, -1], [0, 2, 4]]),
        num_generations=2,
        num_tokens=6,
        ddof=0,
        eps=0.0,
    )
    right, wrong = 1.2247448714, -0.8164965809
    expected = [
        [right + wrong, right + wrong, wrong, 0, 0, 0],
        [2 * wrong + right, wrong + right, wrong + right, right, right, 0],
    ]
    assert_close("advantages", advantages, torch.tensor(expected), rtol=1e-6)


def test_groups_are_scored_apart():
    # One step each: 0, 1 have the sample std .7071, and 5, 9 the same scores.
    advantages = process_advantages(
        torch.tensor([[0.0], [1.0], [5.0], [9.0]]), torch.zeros(4, 1), num_generations=2, num_tokens=1, eps=0.0
    )
    assert_close("advantages", advantages, torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]) * 0.5**0.5, rtol=1e-6)


def test_two_steps_may_end_at_the_same_token():
    advantages = process_advantages(
        torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2), num_generations=2, num_tokens=2, ddof=0, eps=0.0
    )
    assert advantages.tolist() == [[2.0, 2.0], [-2.0, -2.0]]


def test_constant_steps_give_exactly_zero():
    steps = torch.full((8, 1), 0.7)
    advantages = process_advantages(steps, torch.zeros(8, 1), num_generations=8, num_tokens=3, eps=0.0)
    assert (advantages == 0).all()


def test_a_group_without_steps_gives_zero():
    advantages = process_advantages(torch.full((2, 3), NAN), torch.zeros(2, 3), num_generations=2, num_tokens=4)
    assert (advantages == 0).all()


@pytest.mark.parametrize(
    ("rewards", "ends", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 3), r"shape \(2, 2\) and step_ends \(2, 3\)"),
        (torch.zeros(3, 1), torch.zeros(3, 1), "3 rows, which is not a multiple of num_generations=2"),
        (torch.tensor([[0.0], [torch.inf]]), torch.zeros(2, 1), "infinite reward"),
        (torch.zeros(2, 1), torch.tensor([[3], [4]]), "Step 0 of completion 1 ends at token 4, .* 4 tokens, 0 to 3"),
        (torch.zeros(2, 1), torch.tensor([[-1], [0]]), "Step 0 of completion 0 ends at token -1"),
    ],
)
def test_steps_that_do_not_fit_are_refused(rewards, ends, message):
    with pytest.raises(ValueError, match=message):
        process_advantages(rewards, ends, num_generations=2, num_tokens=4)


def steps_of(rewards: list, ends: list, lengths: list[int], returned: list | None = None, **others) -> Rewards:
    """One group whose reward function reported these steps."""
    table = torch.tensor([[NAN if value is None else value] for value in returned or [0.0] * len(lengths)])
    arguments = {"weights": torch.ones(table.shape[1]), "names": ("graded",)} | others
    return Rewards.from_table(
        table, num_generations=len(lengths), lengths=torch.tensor(lengths), steps=(rewards, ends), **arguments
    )


def test_the_estimator_reads_the_steps_that_a_reward_function_reported():
    # The first example above; the longest completion has 6 tokens.
    rewards = steps_of([[1.0, 0.0], [0.0, 0.0, 1.0]], [[1, 2], [0, 2, 4]], [4, 6])
    advantages = estimate("process", rewards, {"ddof": 0, "eps": 0.0})
    right, wrong = 1.2247448714, -0.8164965809
    expected = [
        [right + wrong, right + wrong, wrong, 0, 0, 0],
        [2 * wrong + right, wrong + right, wrong + right, right, right, 0],
    ]
    assert_close("advantages", advantages, torch.tensor([expected]), rtol=1e-6)
    # Means over 4 and 6 tokens.
    means = torch.tensor([[(2 * right + 3 * wrong) / 4, (5 * right + 4 * wrong) / 6]])
    assert_close("means", rewards.per_completion(advantages), means, rtol=1e-6)


@pytest.mark.parametrize("taken_out", ["no steps", "no reward"])
def test_a_completion_that_is_taken_out_leaves_the_others_alone(taken_out):
    steps = [[1.0], [0.0], [] if taken_out == "no steps" else [9.0]]
    ends = [[1], [1], [] if taken_out == "no steps" else [0]]
    returned = [1.0, 0.0, 0.0 if taken_out == "no steps" else None]
    advantages = estimate("process", steps_of(steps, ends, [2, 2, 3], returned), {"ddof": 0, "eps": 0.0})
    assert advantages.tolist() == [[[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    ("rewards", "ends", "message"),
    [
        ([[0.0], [1.0, 2.0]], [[0], [1]], r"Completion 1 has step_rewards \[1.0, 2.0\] and step_ends \[1.0\]"),
        ([[0.0], [float("inf")]], [[0], [1]], r"Completion 1 has step_rewards \[inf\]. Use finite"),
        ([[0.0], [1.0]], [[0], [2]], r"Completion 1 has 2 tokens and step_ends \[2.0\]. .* counted from 0"),
        ([[0.0], [1.0]], [[-1], [1]], r"Completion 0 has 3 tokens and step_ends \[-1.0\]"),
        ([[0.0], [1.0]], [[0.5], [1]], r"Completion 0 has 3 tokens and step_ends \[0.5\]"),
    ],
)
def test_reported_steps_that_do_not_fit_are_refused(rewards, ends, message):
    with pytest.raises(ValueError, match=message):
        steps_of(rewards, ends, [3, 2])


def test_the_estimator_without_steps_says_how_to_report_them():
    with pytest.raises(ValueError, match=r"no reward function gave any.*log_extra\('step_rewards', ...\)"):
        estimate("process", rewards_of([[0, 1]]))


def test_a_second_reward_that_would_have_no_effect_is_refused_unless_it_weighs_nothing():
    rewards = rewards_of([[[0, 5], [1, 6]]])
    steps = Steps.from_rows([[0.0], [1.0]], [[0], [0]], lengths=rewards.lengths)
    with pytest.raises(ValueError, match="those of 'reward_0', 'reward_1' would not all have an effect"):
        estimate("process", replace(rewards, steps=steps))
    watched = replace(rewards, steps=steps, weights=torch.tensor([1.0, 0.0]))
    assert estimate("process", watched, {"ddof": 0, "eps": 0.0}).tolist() == [[[-1.0], [1.0]]]


@pytest.mark.parametrize(
    "modifiers", [{"clip": {"max": 0.5}}, {"difficulty": {}}, {"filter_zero_std": {"by": "reward_0"}}]
)
def test_a_modifier_treats_each_token_as_it_treats_a_completion(modifiers):
    rewards = rewards_of([[1, 0, 0], [1, 1, 1], [1, 1, 0]], lengths=[5, 5, 5])
    advantages = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    token_by_token = [apply_to_advantages(rewards, token, modifiers) for token in advantages.unbind(-1)]
    modified = apply_to_advantages(rewards, advantages, modifiers)
    assert not torch.equal(modified, advantages)
    assert torch.equal(modified, torch.stack(token_by_token, -1))


def test_what_lies_past_the_end_of_a_completion_is_zero():
    advantages = checked(
        "hook", torch.full((1, 2, 4), NAN).where(torch.arange(4) >= 3, 1.0), rewards_of([[0, 1]], lengths=[3, 1])
    )
    assert advantages.tolist() == [[[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]


def test_a_judge_that_is_down_and_reports_no_steps_gives_zeros():
    down = replace(steps_of([[1.0], [0.0]], [[1], [1]], [2, 3]), steps=None, values=torch.full((1, 2, 1), NAN))
    assert estimate("process", down).tolist() == [[[0.0] * 3, [0.0] * 3]]


@pytest.mark.parametrize("steps", [[None, 1.0], ["a", 1.0]])
def test_a_step_without_a_number_names_its_completion(steps):
    with pytest.raises(ValueError, match=r"Completion 1 has step_rewards \[.*, 1.0\]. Give a list of numbers."):
        steps_of([[1.0, 1.0], steps], [[0, 1], [0, 1]], [2, 2])
