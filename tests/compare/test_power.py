import math

import pytest
import torch

from grpo_plus.compare.intervals import means, t_quantile
from grpo_plus.compare.power import Spread, power, seeds_needed, spread_of


@pytest.mark.parametrize(("effect", "table"), [(1.0, 10), (0.8, 15), (0.5, 34)])
def test_the_seeds_are_those_of_the_printed_tables_for_a_paired_t_test(effect, table):
    """Two-sided at 5 %, power 80 %: difference over its standard deviation, and pairs."""
    assert seeds_needed(effect, Spread(between=1.0, items=0.0)) == table


@pytest.mark.parametrize(("seeds", "comparisons"), [(4, 1), (6, 3)])
def test_power_is_how_often_drawn_seeds_show_the_difference(seeds, comparisons):
    level = 1 - 0.05 / comparisons
    generator = torch.Generator().manual_seed(0)
    drawn = 1.5 + torch.randn(100_000, seeds, generator=generator)
    ratio = drawn.mean(1) / (drawn.std(1) / math.sqrt(seeds))
    often = (ratio > t_quantile(seeds - 1, level)).double().mean().item()
    assert power(1.5 * math.sqrt(seeds), seeds - 1, level) == pytest.approx(often, abs=6e-3)


def test_more_comparisons_need_more_seeds():
    assert seeds_needed(1.0, Spread(1.0, 0.0), comparisons=6) > seeds_needed(1.0, Spread(1.0, 0.0))


def test_no_number_of_seeds_makes_up_for_too_few_items_or_for_no_difference():
    assert seeds_needed(1.0, Spread(between=1.0, items=0.3)) is None
    assert seeds_needed(0.0, Spread(between=1.0, items=0.0)) is None
    assert seeds_needed(0.0, Spread(between=0.0, items=0.0)) is None
    assert seeds_needed(0.1, Spread(between=0.0, items=0.0)) == 3


def test_the_spread_gives_back_the_error_of_the_interval_that_it_was_read_from():
    apart = torch.tensor([[0.1], [0.3], [0.2], [0.4]]).expand(4, 40)
    error = 0.2
    spread = spread_of(apart, t_quantile(3, 1 - 0.05 / 3) * error, comparisons=3)
    assert spread.between == pytest.approx(0.05 / 3)  # deviations ±0.05 and ±0.15: 2 (0.0025 + 0.0225) / 3
    assert spread.error(4) == pytest.approx(error)
    assert spread.error(8) < error


@pytest.mark.parametrize("of_item", [0.0, 0.3])
def test_what_is_known_from_few_seeds_is_the_error_of_the_interval_of_many(of_item):
    """Right or wrong by chance is averaged out by more seeds; an item that suits one variant on every seed is not."""
    generator = torch.Generator().manual_seed(0)
    suits = of_item * torch.randn(1, 200, generator=generator)
    apart = suits + 0.02 * torch.randn(40, 1, generator=generator) + 0.6 * torch.randn(40, 200, generator=generator)

    def error(seeds):
        interval = means({"apart": apart[:seeds]})["apart"]
        return (interval.high - interval.low) / 2 / t_quantile(seeds - 1)

    few = 8
    spread = spread_of(apart[:few], error(few) * t_quantile(few - 1), comparisons=1)
    assert spread.error(40) == pytest.approx(error(40), rel=0.25)
