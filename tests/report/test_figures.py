import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from grpo_plus.report import curves, figures, svg
from tests.report.hostile import HOSTILE, NAMES


@pytest.mark.parametrize("draw", [
    lambda: figures.heatmap(NAMES, np.array([[1, 0.5, np.nan, 0]] * 4), label="$x$", low=0, high=1),
    lambda: figures.bars(dict(zip(NAMES, [0.1, float("nan"), 0.0, 2.0], strict=True)), label="<x>"),
    lambda: figures.stacked({name: {HOSTILE: 0.5, "b": 0.25} for name in NAMES}, label="x"),
    lambda: figures.stacked({name: {f"task {k}": 0.05 for k in range(12)} for name in NAMES}, label="x"),
    lambda: figures.histograms({name: np.array([0.0, 1.0, -9.0]) for name in NAMES} | {"zeros": np.zeros(3)}),
    lambda: figures.side_by_side(NAMES, np.array([[0.0, 0.0], [1.0, -1.0], [1e9, 1.0], [-1e-9, 0.0]])),
    lambda: figures.side_by_side(NAMES, np.random.default_rng(0).normal(size=(4, 64))),
], ids=["heatmap", "bars", "stacked", "many parts", "histograms", "group", "large group"])  # fmt: skip
def test_figures_are_well_formed_and_take_the_pages_colours(draw):
    drawn = draw()
    root = ElementTree.fromstring(drawn)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root.get("viewBox").startswith("0 0 ")
    assert root.get("width") is None
    assert "var(--ink)" in drawn
    assert not set(svg.PAGE) & set(re.findall(r"#\w{6}", drawn))
    assert draw() == drawn


def test_shares_that_are_too_many_are_added_up():
    drawn = figures.stacked({"grpo": {f"task {k}": 1 / 12 for k in range(12)}}, label="x")
    assert "5 others" in drawn
    assert "task 6" in drawn
    assert "task 7" not in drawn


def drawn_intervals(bounds, **changes):
    rows = {"a": curves.Estimate(0.5, *bounds, dots=(0.4, 0.6)), "b": curves.Estimate(0.2, 0.1, 0.3)}
    return curves.intervals(rows, **({"label": "x", "limits": (0.0, 1.0)} | changes))


def test_intervals_without_bounds_are_points():
    without, within = drawn_intervals((math.nan, math.nan)), drawn_intervals((0.4, 0.6))
    assert within.count("<path") == without.count("<path") + 1


def test_an_interval_that_goes_on_beyond_the_axis_says_so():
    within = drawn_intervals((0.4, 0.6))
    assert drawn_intervals((0.4, 1.6)).count("<use") == within.count("<use") + 1
    assert drawn_intervals((-0.4, 1.6)).count("<use") == within.count("<use") + 2


def test_a_line_to_compare_with_has_its_name():
    assert ">start<" in drawn_intervals((0.4, 0.6), line=curves.Line(0.1, "start"))


@pytest.mark.parametrize(("values", "least", "limits"), [
    ([0.71, 0.72], 0, (0.0, 1.0)),  # accuracies that differ by noise
    ([0.03, 0.04], 0, (0.0, 0.04)),
    ([7.0, 7.1], 0, (0.0, 8.0)),
    ([-0.02, 0.3], 0, (-0.02, 0.3)),
    ([0.001, -0.002], 0.07, (-0.08, 0.08)),
    ([math.nan, 120.0, math.inf], 0, (0.0, 120.0)),
    ([0.0], 0, (0.0, 1.0)),
    ([], 0, (0.0, 1.0)),
])  # fmt: skip
def test_an_axis_begins_at_zero_and_ends_at_a_round_number(values, least, limits):
    assert svg.round_limits(values, least=least) == pytest.approx(limits)
