"""Drawings of trainings: curves with bands, and estimates with intervals, as SVG for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from grpo_plus.report.svg import INK, SERIES, SOFT, new_figure, round_limits, settings, short, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """One line over the steps with its band; NaN bounds draw none."""

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """A value with its bounds, NaN where there are none, and the single values that it is the mean of."""

    value: float
    low: float
    high: float
    dots: Sequence[float] = ()


@dataclass(frozen=True)
class Line:
    """A vertical line to compare estimates with, and its name."""

    at: float
    name: str


def curves(series: Mapping[str, Curve], *, title: str) -> str:
    """A line per name with its band, on an axis that holds zero; beyond the eighth, colors come with another dash."""
    with settings():
        columns = 2 if len(series) == 4 else 3
        rows = -(-len(series) // columns)
        figure, axes = new_figure(1.8 + 0.16 * rows)
        for k, (name, curve) in enumerate(series.items()):
            color, dash = SERIES[k % len(SERIES)], DASHES[k // len(SERIES) % len(DASHES)]
            axes.plot(curve.steps, curve.values, dash, color=color, linewidth=1.2, label=short(name))
            if not np.isnan(curve.low).any():
                # Bands of many variants lie upon each other; together they are no darker than those of three.
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=min(0.16, 0.5 / len(series)))
        axes.set_ylim(*round_limits([value for curve in series.values() for value in curve.values]))
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        axes.grid(axis="y", alpha=0.6)
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1)
        return to_svg(figure, f"Curves of {title} over the steps, for {', '.join(series)}.")


def intervals(
    rows: Mapping[str, Estimate],
    *,
    label: str,
    limits: tuple[float, float],
    line: Line | None = None,
    marked: Sequence[str] = (),
) -> str:
    """An estimate per name: a disk on its interval, and below them a ring for each single value.

    Args:
        limits: of the axis. An interval that goes on beyond a limit ends there in an arrow.
        marked: the names to set apart.
    """
    with settings():
        figure, axes = new_figure(0.24 * len(rows) + 0.62)
        axes.set_xlim(*limits)
        for k, (name, estimate) in enumerate(rows.items()):
            _draw(axes, k, estimate, SERIES[1] if name in marked else SERIES[0])
        if line is not None:
            axes.axvline(line.at, color=SOFT, linewidth=0.8, linestyle="--", zorder=0)
            axes.text(line.at, 1.02, line.name, transform=axes.get_xaxis_transform(), ha="center", color=SOFT)
        axes.set_yticks(range(len(rows)), [_row_name(name) for name in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.6)
        axes.set_xlabel(label)
        return to_svg(figure, f"Intervals: {label}, for {', '.join(rows)}. The table has the figures.")


def _draw(axes: "Axes", row: int, estimate: Estimate, color: str) -> None:
    """One row: the interval, the estimate on it, the single values below."""
    low, high = axes.get_xlim()
    if not np.isnan([estimate.low, estimate.high]).any():
        ends = np.clip([estimate.low, estimate.high], low, high)
        axes.plot(ends, [row, row], color=color, linewidth=2.4, alpha=0.55, solid_capstyle="butt")
        for end, marker, beyond in ((low, "<", estimate.low < low), (high, ">", estimate.high > high)):
            if beyond:
                axes.plot([end], [row], marker, color=color, markersize=3.5, clip_on=False)
    axes.plot(estimate.dots, [row + 0.28] * len(estimate.dots), "o", color=INK, mfc="none", mew=0.6, markersize=2.6)
    axes.plot([estimate.value], [row], "o", color=color, markersize=4.5, clip_on=False)


def _row_name(name: str) -> str:
    """A name, or two with a minus between them, each cut where it is long."""
    return " - ".join(short(part) for part in name.split(" - "))
