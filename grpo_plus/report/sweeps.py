"""A drawing of a sweep: the score by the value of a field, as SVG for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_plus.report.svg import SERIES, new_figure, round_limits, settings, short, to_svg

STEEP = 5  # values that are this many times apart stand on a logarithmic axis


@dataclass(frozen=True)
class Tried:
    """One variant in a sweep.

    Attributes:
        values: of the field, in increasing order.
        scores: at each value, by seed.
        chosen: the value that was chosen; None where none was.
    """

    values: Sequence[float]
    scores: Sequence[Sequence[float]]
    chosen: float | None = None


def by_value(series: Mapping[str, Tried], *, field: str, score: str) -> str:
    """A line of means per name, a dot per seed, and a ring around the chosen value."""
    with settings():
        columns = 2 if len(series) == 4 else 3
        figure, axes = new_figure(1.6 + 0.16 * -(-len(series) // columns))
        for k, (name, tried) in enumerate(series.items()):
            color = SERIES[k % len(SERIES)]
            means = [sum(scores) / len(scores) for scores in tried.scores]
            axes.plot(tried.values, means, color=color, linewidth=1.2, label=short(name))
            for value, scores, mean in zip(tried.values, tried.scores, means, strict=True):
                axes.plot([value] * len(scores), scores, "o", color=color, markersize=2.2, alpha=0.6)
                if value == tried.chosen:
                    axes.plot([value], [mean], "o", color=color, markersize=7, mfc="none", mew=1.2)
        values = sorted({value for tried in series.values() for value in tried.values})
        if values and values[0] > 0 and values[-1] >= STEEP * values[0]:
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.set_ylim(
            *round_limits([value for tried in series.values() for of_one in tried.scores for value in of_one])
        )
        axes.grid(axis="y", alpha=0.6)
        axes.set_xlabel(field)
        axes.set_ylabel(score)
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1)
        return to_svg(figure, f"{score} by {field}, for {', '.join(series)}. The table has the figures.")
