import math

import pytest
import torch

from grpo_plus.advantages.reductions import center, cosine, count, has_spread, mean, others, std
from tests.close import assert_close

NAN = float("nan")


@pytest.mark.parametrize("values", [[3.0], [NAN, 3.0], [NAN, NAN], [0.7] * 8])
@pytest.mark.parametrize("ddof", [0, 1])
def test_std_is_exactly_zero_without_spread(values, ddof):
    assert std(torch.tensor(values), ddof=ddof).item() == 0


def test_a_difference_of_float32_rounding_is_no_spread():
    assert has_spread(torch.tensor([[0.7, 0.7000001], [0.7, 0.70001], [1e8, 1e8 + 8]])).tolist() == [
        [False],
        [True],
        [False],
    ]


def test_a_weight_counts_an_entry_so_many_times():
    values, weights = torch.tensor([1.0, 4.0, NAN]), torch.tensor([3.0, 1.0, 7.0])
    repeated = torch.tensor([1.0, 1.0, 1.0, 4.0])
    assert count(values, weights).item() == 4
    assert_close("mean", mean(values, weights), mean(repeated), rtol=1e-6)
    assert_close("std", std(values, weights=weights), std(repeated), rtol=1e-6)
    assert_close("centered", center(values, weights)[:2], torch.tensor([-0.75, 2.25]), rtol=1e-6)


def test_others_leave_out_one_entry_each():
    assert others(torch.tensor([1.0, 2.0])).nan_to_num(nan=-1).tolist() == [[-1, 2], [1, -1]]


def test_the_cosine_of_a_worked_example_and_of_nothing():
    # 3 * 4 + 4 * 3 over 5 * 5
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(24 / 25, rel=1e-12)
    assert math.isnan(cosine(torch.tensor([3.0, 4.0]), torch.zeros(2)))
