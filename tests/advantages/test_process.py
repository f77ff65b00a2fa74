import pytest
import torch

from grpo_plus.advantages import process_advantages
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
