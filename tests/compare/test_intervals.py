import math
import statistics

import pytest
import torch

from grpo_plus.compare import intervals
from grpo_plus.compare.intervals import band, differences, means, pairs, t_quantile


def of_seeds(*values, items=1):
    """(S, I) scores that are the same for every item."""
    return torch.tensor(values).double().unsqueeze(1).repeat(1, items)


def t_interval(values, critical):
    center, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    return center - critical * error, center + critical * error


@pytest.mark.parametrize(("degrees", "table"), [(1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (30, 2.042)])
def test_quantiles_are_those_of_the_printed_tables(degrees, table):
    assert t_quantile(degrees) == pytest.approx(table, abs=6e-4)


def test_quantiles_at_another_level():
    assert t_quantile(7, 0.9) == pytest.approx(1.895, abs=6e-4)


def test_a_single_pair_without_items_is_near_the_t_interval():
    first = (0.70, 0.81, 0.74, 0.90, 0.66, 0.77, 0.85, 0.79)
    second = (0.60, 0.75, 0.70, 0.72, 0.66, 0.60, 0.74, 0.71)
    [found] = differences({"a": of_seeds(*first), "b": of_seeds(*second)}, [("a", "b")])
    low, high = t_interval([x - y for x, y in zip(first, second, strict=True)], 2.365)
    assert found.interval.estimate == pytest.approx(0.0925)
    assert found.interval.high - found.interval.low == pytest.approx(high - low, rel=0.04)
    assert found.interval.excludes_zero


def test_three_seeds_are_near_the_t_interval_too():
    # A resample of 3 has two thirds of the variance, and its mean takes 10 values only.
    [found] = differences({"a": of_seeds(0.1, 0.3, 0.2), "b": of_seeds(0.0, 0.0, 0.0)}, [("a", "b")])
    low, high = t_interval([0.1, 0.3, 0.2], 4.3027)
    assert found.interval.high - found.interval.low == pytest.approx(high - low, rel=0.04)


def test_pairs_cancel_what_all_variants_share():
    hard_seed = (0.1, 0.9, 0.4, 0.6)
    scores = {"a": of_seeds(*(x + 0.05 for x in hard_seed)), "b": of_seeds(*hard_seed)}
    scores["a"] = scores["a"] + torch.tensor([[1e-3], [-1e-3], [1e-3], [-1e-3]])
    [found] = differences(scores, pairs(list(scores)))
    assert found.interval.low > 0.04
    assert means(scores)["a"].low < 0.2  # on its own, it is as uncertain as the seeds


def test_few_held_out_items_make_an_interval_wide_though_all_seeds_agree():
    agreed = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 0.0]] * 5)
    other = torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]] * 5)
    [found] = differences({"a": agreed, "b": other}, [("a", "b")])
    assert found.interval.estimate == pytest.approx(1 / 6)
    assert not found.interval.excludes_zero


def test_more_comparisons_make_every_interval_wider():
    generator = torch.Generator().manual_seed(0)
    scores = {f"e{k}": torch.rand(5, 50, generator=generator) for k in range(6)}
    [one] = differences(scores, [("e0", "e1")])
    first = differences(scores, pairs(list(scores)))[0]
    assert (first.first, first.second) == ("e0", "e1")
    assert first.interval.estimate == one.interval.estimate
    assert first.interval.high - first.interval.low > 1.3 * (one.interval.high - one.interval.low)


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_give_no_bounds(seeds):
    [found] = differences({"a": torch.ones(seeds, 9), "b": torch.zeros(seeds, 9)}, [("a", "b")])
    assert found.interval.estimate == 1.0
    assert not found.interval.exists
    assert not found.interval.excludes_zero
    assert [bound for bound in band(torch.ones(seeds, 4)) if not bound.isnan().all()] == []


def test_equal_scores_show_no_difference():
    [found] = differences({"a": torch.ones(3, 9), "b": torch.ones(3, 9)}, [("a", "b")])
    assert (found.interval.low, found.interval.high) == (0.0, 0.0)
    assert not found.interval.excludes_zero


def test_the_same_scores_give_the_same_bounds_whatever_was_drawn_before():
    scores = {name: torch.rand(4, 20, generator=torch.Generator().manual_seed(k)) for k, name in enumerate("ab")}
    first = differences(scores, [("a", "b")])
    torch.rand(7)
    state = torch.get_rng_state()
    assert differences(scores, [("a", "b")]) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_pairs_with_and_without_a_baseline():
    assert pairs(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs(["a", "b", "c"], "b") == [("a", "b"), ("c", "b")]


@pytest.mark.parametrize(("seeds", "items", "spread"), [(3, 40, 0.1), (5, 40, 0.1), (8, 40, 0.02)])
def test_all_intervals_of_a_comparison_without_differences_hold_together(seeds, items, spread, monkeypatch):
    """Four variants that are the same: in at most about one of twenty comparisons any pair may look different."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    generator = torch.Generator().manual_seed(seeds)
    wrong = 0
    for _ in range(100):
        item = torch.randn(1, items, generator=generator)
        scores = {
            name: item
            + spread * torch.randn(seeds, 1, generator=generator)
            + 0.1 * torch.randn(1, items, generator=generator)
            + 0.2 * torch.randn(seeds, items, generator=generator)
            for name in "abcd"
        }
        found = differences(scores, pairs("abcd"))
        wrong += any(difference.interval.excludes_zero for difference in found)
    assert wrong <= 10  # more than 10 of 100 at 5 %: a chance of 1 in 90


@pytest.mark.parametrize("baseline", [None, "a"])
def test_they_hold_together_where_seeds_alone_differ_too(baseline, monkeypatch):
    """Every pair's error is estimated on its own, so that many pairs of few seeds have a small one by chance."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(200):
        scores = {name: torch.randn(3, 1, generator=generator) for name in "abcdefgh"}
        found = differences(scores, pairs("abcdefgh", baseline))
        wrong += any(difference.interval.excludes_zero for difference in found)
    assert wrong <= 19  # more than 19 of 200 at 5 %: a chance of 1 in 300


def test_the_band_is_the_t_interval_at_each_step():
    curves = torch.tensor([[0.1, 0.5], [0.2, 0.5], [0.6, 0.5]]).double()
    low, high = band(curves)
    assert (low[0].item(), high[0].item()) == pytest.approx(t_interval([0.1, 0.2, 0.6], 4.3027), rel=1e-3)
    assert (low[1].item(), high[1].item()) == (0.5, 0.5)
