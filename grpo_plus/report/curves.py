"""Drawings of trainings: curves with bands, and estimates with intervals, as SVG for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo_plus.report.svg import INK, SERIES, SOFT, new_figure, settings, short, to_svg

DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """One line over the steps with its band; NaN bounds draw none."""

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curves(series: Mapping[str, Curve], *, title: str) -> str:
    """A line per name with its band; beyond the eighth, colors come again with another dash."""
    with settings():
        columns = 2 if len(series) == 4 else 3
        rows = -(-len(series) // columns)
        figure, axes = new_figure(1.9 + 0.16 * rows)
        for k, (name, curve) in enumerate(series.items()):
            color, dash = SERIES[k % len(SERIES)], DASHES[k // len(SERIES) % len(DASHES)]
            axes.plot(curve.steps, curve.values, dash, color=color, linewidth=1.1, label=short(name))
            if not np.isnan(curve.low).any():
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.16, linewidth=0)
        axes.set_xlabel("step")
        axes.set_title(short(title), fontsize=7, pad=3, color=INK)
        axes.margins(x=0.01)
        figure.legend(loc="outside upper center", ncols=columns, handlelength=1.6, columnspacing=1)
        return to_svg(figure, f"Curves of {title} over the steps, for {', '.join(series)}.")


def intervals(
    rows: Mapping[str, tuple[float, float, float]], *, label: str, line: float | None = None, marked: Sequence[str] = ()
) -> str:
    """An estimate per name with its bounds, NaN where there are none; a vertical `line` to compare with."""
    with settings():
        figure, axes = new_figure(0.17 * len(rows) + 0.5)
        for k, (name, (estimate, low, high)) in enumerate(rows.items()):
            color = SERIES[1] if name in marked else SERIES[0]
            if not np.isnan([low, high]).any():
                axes.plot([low, high], [k, k], color=color, linewidth=2.2, solid_capstyle="butt")
            axes.plot([estimate], [k], "o", color=color, markersize=4)
        if line is not None:
            axes.axvline(line, color=SOFT, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), [_row_name(name) for name in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.05)
        axes.set_xlabel(label)
        return to_svg(figure, f"Intervals: {label}, for {', '.join(rows)}. The table has the figures.")


def _row_name(name: str) -> str:
    """A name, or two with a minus between them, each cut where it is long."""
    return " - ".join(short(part) for part in name.split(" - "))
