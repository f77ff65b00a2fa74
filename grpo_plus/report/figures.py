"""Drawings of advantages and of what they are made of, as SVG for a report."""

from collections.abc import Mapping, Sequence

import numpy as np

from grpo_plus.report.svg import INK, SERIES, SOFT, WIDTH, name_rows, new_figure, settings, short, to_svg


def heatmap(names: Sequence[str], values: np.ndarray, *, label: str, low: float, high: float) -> str:
    """A square matrix of names against names, in ten steps of color; the diagonal and NaN are left empty."""
    with settings():
        figure, axes = new_figure(max(1.6, 0.14 * len(names) + 1.5))
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm

        shown = np.ma.masked_invalid(np.where(np.eye(len(names), dtype=bool), np.nan, values))
        steps = BoundaryNorm(np.linspace(low, high, 11), colormaps["cividis"].N)
        mesh = axes.pcolormesh(shown, cmap="cividis", norm=steps, edgecolors="face", linewidth=0.3)
        axes.set_xticks(np.arange(len(names)) + 0.5, [short(name) for name in names], rotation=90)
        axes.set_yticks(np.arange(len(names)) + 0.5, [short(name) for name in names])
        axes.tick_params(length=0, pad=1)
        axes.invert_yaxis()
        bar = figure.colorbar(mesh, ax=axes, location="top", fraction=0.04, pad=0.02, aspect=40)
        bar.set_ticks(np.linspace(low, high, 6).tolist(), labels=[f"{tick:.2g}" for tick in np.linspace(low, high, 6)])
        bar.minorticks_off()
        bar.set_label(label)
        bar.outline.set_visible(False)
        return to_svg(figure, f"Matrix: {label}. The table below has its figures.")


def bars(values: Mapping[str, float], *, label: str, limit: float | None = None, mark: str | None = None) -> str:
    """One horizontal bar per name; `mark` is set apart."""
    with settings():
        figure, axes = new_figure(0.15 * len(values) + 0.5)
        names = list(values)
        heights = np.nan_to_num(np.array(list(values.values()), dtype=float))
        colors = [SERIES[1] if name == mark else SERIES[0] for name in names]
        axes.barh(range(len(names)), heights, color=colors, height=0.72)
        for k, (height, value) in enumerate(zip(heights, values.values(), strict=True)):
            text = f"{value:.2g}" if value == value else "n/a"
            axes.annotate(text, (height, k), (3, 0), textcoords="offset points", va="center", fontsize=6, color=SOFT)
        name_rows(axes, names)
        axes.set_xlim(0, limit or max(heights.max(initial=0) * 1.12, 1e-9))
        axes.set_xlabel(label)
        return to_svg(figure, f"Bars: {label}, for {', '.join(names)}.")


def stacked(shares: Mapping[str, Mapping[str, float]], *, label: str) -> str:
    """One horizontal bar per name, divided into parts; the parts beyond the eighth are added up."""
    with settings():
        names = list(shares)
        parts = list(dict.fromkeys(part for line in shares.values() for part in line))
        rows = -(-min(len(parts), len(SERIES)) // 3)
        figure, axes = new_figure(0.15 * len(names) + 0.6 + 0.16 * rows)
        matrix = np.array([[shares[name].get(part, 0.0) for part in parts] for name in names])
        matrix = np.nan_to_num(matrix)
        if len(parts) > len(SERIES):
            kept = len(SERIES) - 1
            matrix = np.concatenate([matrix[:, :kept], matrix[:, kept:].sum(1, keepdims=True)], axis=1)
            parts = [*parts[:kept], f"{len(parts) - kept} others"]
        left = np.zeros(len(names))
        for k, part in enumerate(parts):
            axes.barh(range(len(names)), matrix[:, k], left=left, color=SERIES[k], height=0.72, label=short(part))
            left = left + matrix[:, k]
        name_rows(axes, names)
        axes.set_xlim(0, 1)
        axes.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=3, handlelength=1, columnspacing=1)
        return to_svg(figure, f"Divided bars: {label}, by {', '.join(parts)}. The table below has the figures.")


def histograms(samples: Mapping[str, np.ndarray]) -> str:
    """A small histogram per name, each on its own axis in units of its root mean square."""
    with settings():
        from matplotlib.figure import Figure

        columns = 3
        rows = -(-len(samples) // columns)
        figure = Figure(figsize=(WIDTH, 0.62 * rows + 0.3), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        edges = np.linspace(-4, 4, 33)
        for axes, (name, values) in zip(grid.flat, samples.items(), strict=False):
            scale = np.sqrt(np.mean(values**2)) or 1.0
            counts = np.histogram(np.clip(values / scale, -4, 4), edges)[0]
            axes.stairs(counts / max(len(values), 1), edges, fill=True, color=SERIES[0])
            axes.set_title(short(name), fontsize=6.5, pad=1, color=INK)
        for index, axes in enumerate(grid.flat):
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            if index >= len(samples):
                axes.set_visible(False)
        figure.supxlabel("advantage, in units of its root mean square", fontsize=7, color=SOFT)
        return to_svg(figure, f"Histograms of the advantages under {', '.join(samples)}.")


def side_by_side(names: Sequence[str], advantages: np.ndarray) -> str:
    """(E, G) advantages of one group: a row per name, colored in units of the row's largest."""
    with settings():
        from matplotlib import colormaps

        figure, axes = new_figure(0.15 * len(names) + 0.5)
        largest = np.abs(advantages).max(axis=1, keepdims=True)
        units = advantages / np.where(largest > 0, largest, 1)
        axes.pcolormesh(units, cmap="RdBu", vmin=-1.4, vmax=1.4, edgecolors="face", linewidth=0.3)
        if advantages.shape[1] <= 8:
            for (row, column), value in np.ndenumerate(advantages):
                red, green, blue, _ = colormaps["RdBu"]((units[row, column] + 1.4) / 2.8)
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                text = f"{value:.2f}".replace("-0.00", "0.00")
                color = "white" if dark else "black"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6, color=color)
        marked = np.arange(0, advantages.shape[1], -(-advantages.shape[1] // 16))
        axes.set_xticks(marked + 0.5, [str(number + 1) for number in marked])
        axes.set_xlabel("completion")
        axes.set_yticks(np.arange(len(names)) + 0.5, [short(name) for name in names])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        return to_svg(figure, "Matrix: the advantage of each completion under each estimator; red lowers, blue raises.")
