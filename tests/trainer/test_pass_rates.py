"""The odds of each prompt, by hand, and the draws that follow them."""

import json
from collections import Counter

import pytest
import torch

from grpo_plus.trainer.batches.pass_rates import PassRates


def counted(*visits: tuple[list[int], list[int]], decay: float = 0.5) -> PassRates:
    """Four rows of which four completions each were judged."""
    rates = PassRates(4, decay)
    for rows, passed in visits:
        rates.add(rows, torch.tensor(passed), torch.full((len(rows),), 4))
    return rates


def test_a_prompt_of_mixed_success_and_one_that_is_untried_share_what_the_floor_leaves():
    rates = counted(([0, 1, 2], [4, 0, 2]))
    # p(1 - p): 0 always solved, 0 never solved, 1/4 half solved, 1/4 untried. Of the draws .9 go by it: .45 each, and
    # .1 / 4 to everyone.
    assert rates.probabilities(0.1).tolist() == pytest.approx([0.025, 0.025, 0.475, 0.475])
    assert rates.visited == 0.75


def test_a_later_visit_halves_the_counts_of_the_earlier_ones():
    rates = counted(([0, 1, 2, 3], [4, 0, 2, 1]), ([0], [1]))
    # Row 0: (4/2 + 1) of (4/2 + 4) is 1/2, so 1/4. Row 2: 1/4. Row 3: 1/4 * 3/4 = 3/16. The sum is 11/16.
    assert rates.probabilities(0.1).tolist() == pytest.approx([0.9 * w / 11 + 0.025 for w in (4, 0, 4, 3)])


def test_a_group_that_nobody_judged_is_no_visit():
    rates = PassRates(2, 0.5)
    rates.add([0, 1], torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert rates.visited == 0.5
    assert rates.probabilities(0.5).tolist() == pytest.approx([0.5, 0.5])


def test_draws_are_uniform_where_no_prompt_is_of_use():
    assert counted(([0, 1, 2, 3], [4, 0, 4, 0])).probabilities(0.1).tolist() == [0.25] * 4


def test_prompts_are_drawn_in_proportion_and_never_twice_in_a_batch():
    rates = counted(([0, 1, 2, 3], [4, 0, 2, 1]))
    draws = [rates.draw(2, 0.2, (7, step)) for step in range(2000)]
    assert all(len(set(drawn)) == 2 for drawn in draws)
    # w = 0, 0, 4/16, 3/16 of 7/16.
    expected = [0.05, 0.05, 0.8 * 4 / 7 + 0.05, 0.8 * 3 / 7 + 0.05]
    first = Counter(drawn[0] for drawn in draws)
    assert [first[row] / 2000 for row in range(4)] == pytest.approx(expected, abs=0.03)  # 2.7 standard errors
    second = Counter(drawn[1] for drawn in draws if drawn[0] == 2)
    assert second[3] / first[2] == pytest.approx(expected[3] / (1 - expected[2]), abs=0.04)
    assert draws[0] == rates.draw(2, 0.2, (7, 0)) != rates.draw(2, 0.2, (7, 2))


def test_rows_of_the_batch_return_only_where_too_few_others_are_left():
    rates = counted(([0, 1, 2, 3], [4, 0, 2, 1]))
    assert sorted(rates.draw(2, 0.1, (1,), without={2, 3})) == [0, 1]
    assert len(rates.draw(3, 0.1, (1,), without={2, 3})) == 3


def test_a_state_that_went_through_json_gives_the_same_odds():
    rates, other = counted(([0, 1], [3, 1]), ([1], [0])), counted(([2], [4]))
    other.load(json.loads(json.dumps(rates.state())))
    assert torch.equal(other.probabilities(0.1), rates.probabilities(0.1))
    assert other.state() == rates.state()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"passed": [9.0, 0.0]}, "no counts"),
        ({"rows": [0, 4]}, "no counts"),
        ({"rows": [0]}, "no counts"),
        ({"judged": [float("nan"), 4.0]}, "no counts"),
        ({"judged": None}, "TypeError"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, message):
    rates, kept = counted(([0, 1], [3, 1])), counted(([2], [4]))
    before = kept.state()
    with pytest.raises(ValueError, match=message):
        kept.load(rates.state() | damage)
    assert kept.state() == before
