"""A report as data, and its two forms: one HTML file that needs nothing else, and Markdown.

A report is a list of sections. A section is a list of blocks: headings, paragraphs, tables, figures, and quotes of what
a model wrote. The HTML is `page.html.jinja`, filled.

The HTML holds no script, and its policy forbids scripts. Whatever a model wrote is shown as text.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from grpo_plus.report.text import printable


@dataclass(frozen=True)
class Text:
    """A paragraph, or with `items` a list below it. Words between backticks are names."""

    text: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Table:
    """A header and its rows. Cells that are numbers stand to the right; `folded` tables open on demand."""

    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str | float | None]]
    folded: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Column by column, whether no cell is text."""
        return [not any(isinstance(row[column], str) for row in self.rows) for column in range(len(self.header))]


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG, with what it shows in words for whoever cannot see it."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Quote:
    """Text that a model or a data set wrote; `folded` ones open on demand."""

    title: str
    text: str
    folded: bool = False

    @property
    def scrolls(self) -> bool:
        """Whether the text may be longer than its box."""
        return len(self.text) > 1000 or self.text.count("\n") > 15


Block = Heading | Text | Table | Figure | Quote


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The section's name in links."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def shown(value: str | float | None) -> str:
    """A cell as text: three significant digits, "n/a" for what does not exist."""
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "n/a"
    # With the zeros at the end: 0.660 below 0.661, not 0.66.
    return f"{value:,}" if isinstance(value, int) else f"{value:#.3g}".removesuffix(".")


def to_html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The report as one HTML page."""
    return _template().render(title=title, lead=lead, sections=sections)


def to_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The report as Markdown, without figures and without what a model wrote."""
    parts = [f"# {title}", lead]
    for section in sections:
        blocks = [text for block in section.blocks if (text := _markdown(block))]
        parts += [f"## {section.title}", *blocks] if blocks else []
    return printable("\n\n".join(parts)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Text(text, items):
            return "\n".join([*([text] if text else []), *([""] if text and items else []), *(f"- {i}" for i in items)])
        case Table(caption, header, rows):
            lines = [header, ["---"] * len(header), *([shown(cell) for cell in row] for row in rows)]
            cells = "\n".join(f"| {' | '.join(_in_one_line(cell) for cell in line)} |" for line in lines)
            return f"{caption}\n\n{cells}"
    return ""


def _in_one_line(cell: str) -> str:
    """A cell's text as a table of Markdown can hold it."""
    return re.sub(r"[\r\n]+", " ", cell).replace("|", "\\|")


@functools.cache
def _template() -> Template:
    """The page's template: it makes every text printable, then escapes it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "parts": _parts}
    environment.tests |= {kind.__name__.lower(): _test_of(kind) for kind in get_args(Block)}
    return environment.get_template("page.html.jinja")


def _finalized(value: object) -> object:
    """A text without control characters; markup, which a macro of the template made, as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _parts(text: str) -> list[str]:
    """A text cut at its backticks, so that every second part is a name."""
    return re.split(r"`([^`]+)`", text)


def _test_of(kind: type[Block]) -> Callable[[object], bool]:
    """The template's `is heading`, `is table` and so on."""
    return lambda block: isinstance(block, kind)
