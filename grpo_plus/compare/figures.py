"""Drawings for a report: matplotlib's SVG, coloured by the page, so that light and dark need no second drawing.

Each is drawn for a narrow screen, 3.8 inches wide with text that stays readable there, and scales up. Colours that
should follow the page are drawn as placeholders and replaced by the page's variables.
"""

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_plus.compare.report import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.8
INK, SOFT, LINE = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0a0b{k:02x}" for k in range(1, 9))
PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)"} | {
    colour: f"var(--s{k})" for k, colour in enumerate(SERIES, 1)
}
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "grpo_plus",  # the same drawing is the same text
    "text.parse_math": False,  # a task may be called $x$
    "font.family": "sans-serif",
    "font.size": 7,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
LONGEST_NAME = 24


def heatmap(names: Sequence[str], values: np.ndarray, *, label: str, low: float, high: float) -> str:
    """A square matrix of names against names, in ten steps of colour; the diagonal and NaN are left empty."""
    with _settings():
        figure, axes = _figure(max(1.6, 0.14 * len(names) + 1.5))
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm

        shown = np.ma.masked_invalid(np.where(np.eye(len(names), dtype=bool), np.nan, values))
        steps = BoundaryNorm(np.linspace(low, high, 11), colormaps["cividis"].N)
        mesh = axes.pcolormesh(shown, cmap="cividis", norm=steps, edgecolors="face", linewidth=0.3)
        axes.set_xticks(np.arange(len(names)) + 0.5, [_short(name) for name in names], rotation=90)
        axes.set_yticks(np.arange(len(names)) + 0.5, [_short(name) for name in names])
        axes.tick_params(length=0, pad=1)
        axes.invert_yaxis()
        bar = figure.colorbar(mesh, ax=axes, location="top", fraction=0.04, pad=0.02, aspect=40)
        bar.set_ticks(np.linspace(low, high, 6).tolist(), labels=[f"{tick:.2g}" for tick in np.linspace(low, high, 6)])
        bar.minorticks_off()
        bar.set_label(label)
        bar.outline.set_visible(False)
        return _svg(figure, f"Matrix: {label}. The table below has its figures.")


def bars(values: Mapping[str, float], *, label: str, limit: float | None = None, mark: str | None = None) -> str:
    """One horizontal bar per name; `mark` is set apart."""
    with _settings():
        figure, axes = _figure(0.15 * len(values) + 0.5)
        names = list(values)
        heights = np.nan_to_num(np.array(list(values.values()), dtype=float))
        colours = [SERIES[1] if name == mark else SERIES[0] for name in names]
        axes.barh(range(len(names)), heights, color=colours, height=0.72)
        for k, (height, value) in enumerate(zip(heights, values.values(), strict=True)):
            text = f"{value:.2g}" if value == value else "n/a"
            axes.annotate(text, (height, k), (3, 0), textcoords="offset points", va="center", fontsize=6, color=SOFT)
        _names(axes, names)
        axes.set_xlim(0, limit or max(heights.max(initial=0) * 1.12, 1e-9))
        axes.set_xlabel(label)
        return _svg(figure, f"Bars: {label}, for {', '.join(names)}.")


def stacked(shares: Mapping[str, Mapping[str, float]], *, label: str) -> str:
    """One horizontal bar per name, divided into parts; the parts beyond the eighth are added up."""
    with _settings():
        names = list(shares)
        parts = list(dict.fromkeys(part for line in shares.values() for part in line))
        rows = -(-min(len(parts), len(SERIES)) // 3)
        figure, axes = _figure(0.15 * len(names) + 0.6 + 0.16 * rows)
        matrix = np.array([[shares[name].get(part, 0.0) for part in parts] for name in names])
        matrix = np.nan_to_num(matrix)
        if len(parts) > len(SERIES):
            kept = len(SERIES) - 1
            matrix = np.concatenate([matrix[:, :kept], matrix[:, kept:].sum(1, keepdims=True)], axis=1)
            parts = [*parts[:kept], f"{len(parts) - kept} others"]
        left = np.zeros(len(names))
        for k, part in enumerate(parts):
            axes.barh(range(len(names)), matrix[:, k], left=left, color=SERIES[k], height=0.72, label=_short(part))
            left = left + matrix[:, k]
        _names(axes, names)
        axes.set_xlim(0, 1)
        axes.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=3, handlelength=1, columnspacing=1)
        return _svg(figure, f"Divided bars: {label}, by {', '.join(parts)}. The table below has the figures.")


def histograms(samples: Mapping[str, np.ndarray], *, columns: int = 3) -> str:
    """A small histogram per name, each on its own axis in units of its root mean square."""
    with _settings():
        from matplotlib.figure import Figure

        rows = -(-len(samples) // columns)
        figure = Figure(figsize=(WIDTH, 0.62 * rows + 0.3), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        edges = np.linspace(-4, 4, 33)
        for axes, (name, values) in zip(grid.flat, samples.items(), strict=False):
            scale = np.sqrt(np.mean(values**2)) or 1.0
            counts = np.histogram(np.clip(values / scale, -4, 4), edges)[0]
            axes.stairs(counts / max(len(values), 1), edges, fill=True, color=SERIES[0])
            axes.set_title(_short(name), fontsize=6.5, pad=1, color=INK)
        for index, axes in enumerate(grid.flat):
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            if index >= len(samples):
                axes.set_visible(False)
        figure.supxlabel("advantage, in units of its root mean square", fontsize=7, color=SOFT)
        return _svg(figure, f"Histograms of the advantages under {', '.join(samples)}.")


def side_by_side(names: Sequence[str], advantages: np.ndarray) -> str:
    """(E, G) advantages of one group: a row per name, coloured in units of the row's largest."""
    with _settings():
        from matplotlib import colormaps

        figure, axes = _figure(0.15 * len(names) + 0.5)
        largest = np.abs(advantages).max(axis=1, keepdims=True)
        units = advantages / np.where(largest > 0, largest, 1)
        axes.pcolormesh(units, cmap="RdBu", vmin=-1.4, vmax=1.4, edgecolors="face", linewidth=0.3)
        if advantages.shape[1] <= 8:
            for (row, column), value in np.ndenumerate(advantages):
                red, green, blue, _ = colormaps["RdBu"]((units[row, column] + 1.4) / 2.8)
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                text = f"{value:.2f}".replace("-0.00", "0.00")
                colour = "white" if dark else "black"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6, color=colour)
        marked = np.arange(0, advantages.shape[1], -(-advantages.shape[1] // 16))
        axes.set_xticks(marked + 0.5, [str(number + 1) for number in marked])
        axes.set_xlabel("completion")
        axes.set_yticks(np.arange(len(names)) + 0.5, [_short(name) for name in names])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        return _svg(figure, "Matrix: the advantage of each completion under each estimator; red lowers, blue raises.")


def _settings() -> Any:
    import matplotlib

    return matplotlib.rc_context(SETTINGS)  # type: ignore[arg-type]


def _figure(height: float) -> "tuple[Figure, Axes]":
    # Not pyplot: it keeps figures and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _names(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.margins(y=0.01)
    axes.invert_yaxis()


def _short(name: str) -> str:
    name = printable(name).replace("\n", " ")
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _svg(figure: "Figure", description: str) -> str:
    """The figure as an element for a page: no header, ids of its own, colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="(?!\w+")[^"]*"| id="(figure|patch|axes|matplotlib|line2d|text|xtick|ytick|legend)[^"]*"', "", svg
    )
    own = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{own}", svg)
    for placeholder, variable in PAGE.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1 {}>", svg, count=1)
    return svg.replace("{}", f'role="img" aria-label="{html.escape(printable(description))}"', 1).strip()
