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


def test_intervals_without_bounds_are_points():
    nan = float("nan")
    drawn = curves.intervals({"a": (0.5, nan, nan), "b": (0.2, 0.1, 0.3)}, label="x", line=0.0)
    with_bounds = curves.intervals({"a": (0.5, 0.4, 0.6), "b": (0.2, 0.1, 0.3)}, label="x", line=0.0)
    assert with_bounds.count("<path") == drawn.count("<path") + 1
