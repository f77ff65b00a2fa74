"""A report as data, and its two forms: one HTML file that needs nothing else, and Markdown.

A report is a list of sections. A section is a list of blocks:

| block | what the page shows |
| --- | --- |
| `Answer` | a card: the answer in a sentence, key numbers, reasons, and the next command, ready to copy |
| `Text`, `Heading` | a paragraph with a list; a heading inside a section |
| `Figure` | a drawing on a card; figures that follow each other share a grid |
| `Table` | numbers to the right; tables that follow each other share a grid |
| `Quote` | text that a model or a data set wrote |
| `Beside` | quotes side by side, such as several completions of one prompt |
| `Command` | a command, ready to copy |
| `Fold` | a title that opens any blocks on demand |

The HTML is `page.html.jinja`, filled, in the style of `page.css`. It holds no script, and its policy forbids scripts.
Whatever a model wrote is shown as text.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from grpo_plus.report.text import printable

NARROW = 4  # columns that fit a narrow screen


@dataclass(frozen=True)
class Number:
    """A key number of an answer, as text, with what it is: "0.82" of `gdpo`."""

    value: str
    name: str


@dataclass(frozen=True)
class Answer:
    """What the reader came for, as a card that belongs on the first screen.

    Attributes:
        verdict: one or two sentences. Words between backticks are names, as in every text of a page.
        settled: whether the report has an answer; a card without one has another color and says so in `title`.
        title: the word above the verdict.
        numbers: at most five key numbers.
        reasons: what the verdict rests on, one short sentence each.
        action: what to do next, in words.
        command: the command that does it; empty where there is none.
    """

    verdict: str
    settled: bool = True
    title: str = "Answer"
    numbers: tuple[Number, ...] = ()
    reasons: tuple[str, ...] = ()
    action: str = ""
    command: str = ""


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

    @property
    def wide(self) -> bool:
        """Whether a narrow screen is too narrow for the columns, so that a row becomes a block there."""
        return len(self.header) > NARROW


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
        """Whether the text may be longer than its box, which is about 9 lines of 25 characters where it is smallest."""
        return len(self.text) > 200 or self.text.count("\n") > 7


@dataclass(frozen=True)
class Beside:
    """Quotes side by side, to be read against each other."""

    title: str
    quotes: Sequence[Quote]


@dataclass(frozen=True)
class Command:
    """A command. One click selects all of it, to be copied."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that open on demand, under a title."""

    title: str
    blocks: Sequence["Block"]


Block = Answer | Heading | Text | Table | Figure | Quote | Beside | Command | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The section's name in links."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def in_grids(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """The blocks, in runs: ("figures" or "tables", those that share a grid) and ("", all others)."""
    return [(grid, list(run)) for grid, run in groupby(blocks, key=_grid)]


def _grid(block: Block) -> str:
    if isinstance(block, Figure):
        return "figures"
    return "tables" if isinstance(block, Table) and not block.folded else ""


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
        case Answer():
            reasons = "\n".join(f"- {reason}" for reason in block.reasons)
            parts = (f"**{block.verdict}**", reasons, block.action, _code(block.command))
            return "\n\n".join(part for part in parts if part)
        case Command(text):
            return _code(text)
        case Fold(title, blocks):
            texts = [text for inner in blocks if (text := _markdown(inner))]
            return "\n\n".join([f"### {title}", *texts]) if texts else ""
        case Text(text, items):
            return "\n".join([*([text] if text else []), *([""] if text and items else []), *(f"- {i}" for i in items)])
        case Table(caption, header, rows):
            lines = [header, ["---"] * len(header), *([shown(cell) for cell in row] for row in rows)]
            cells = "\n".join(f"| {' | '.join(_in_one_line(cell) for cell in line)} |" for line in lines)
            return f"{caption}\n\n{cells}"
    return ""


def _code(command: str) -> str:
    """A command in a block of its own, indented: no sign inside can end the block."""
    return "\n".join(f"    {line}" for line in command.splitlines())


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
    environment.filters |= {"shown": shown, "parts": _parts, "in_grids": in_grids}
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
