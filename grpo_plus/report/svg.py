"""What the drawings of a report share: matplotlib's SVG, which takes its colors from the page.

A drawing is made for a narrow screen, 3.8 inches wide, and scales up. Its colors are placeholders, which `to_svg`
replaces by the page's variables, so that one drawing serves the light and the dark page.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from grpo_plus.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.8
INK, SOFT, LINE = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0a0b{k:02x}" for k in range(1, 9))
PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)"} | {
    color: f"var(--s{k})" for k, color in enumerate(SERIES, 1)
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
    "xtick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
LONGEST_NAME = 24
SMALL = 0.25  # the largest share of a drawing whose axis does not go up to 1
ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


def settings() -> Any:
    """A context in which drawings look like the page."""
    import matplotlib

    return matplotlib.rc_context(SETTINGS)  # type: ignore[arg-type]


def new_figure(height: float) -> "tuple[Figure, Axes]":
    """A figure of one panel, as wide as a narrow screen, and `height` inches high."""
    # Not pyplot: it keeps figures and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.locator_params(nbins=6)  # a narrow screen has no place for more
    return figure, axes


def name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Write a name beside each row, the first on top."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.margins(y=0.01)
    axes.invert_yaxis()


def round_limits(values: Iterable[float], *, least: float = 0.0) -> tuple[float, float]:
    """Limits of an axis that holds zero and all values, each a round number.

    An axis that begins beside the values makes noise look like a result. Shares, which lie between 0 and 1, get an
    axis from 0 to 1, unless all of them are small.

    Args:
        least: how far the axis goes at least, on both sides of zero.
    """
    found = [value for value in values if math.isfinite(value)]
    top, bottom = max(least, *found, 0.0), max(least, *(-value for value in found), 0.0)
    if bottom == 0 and SMALL < top <= 1:
        return 0.0, 1.0
    low, high = (_rounded_up(end) if end > 0 else 0.0 for end in (bottom, top))
    return (-low, high) if low or high else (0.0, 1.0)


def _rounded_up(size: float) -> float:
    """The next of 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(step * power for step in ROUND if size <= step * power * (1 + 1e-9))


def short(name: str) -> str:
    """The name, or its end where it is long."""
    name = printable(name).replace("\n", " ")
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def to_svg(figure: "Figure", description: str) -> str:
    """The figure as an element for a page: no header, ids of its own, colors of the page."""
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
