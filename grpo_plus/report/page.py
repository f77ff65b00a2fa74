"""A report as data, and its two forms: one HTML file that needs nothing else, and Markdown.

A report is a list of sections; a section has text, tables, figures and texts of the model's. Whoever has something to
report, a replay or a training comparison, makes the list; nothing here knows about estimators.

The HTML holds no script, and its policy forbids any: what a model wrote is shown as text, whatever it is.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --box: #f6f8fa;
  --link: #0550ae; --s1: #0a5ea8; --s2: #c2570c; --s3: #1a7f5a; --s4: #9b3aa0; --s5: #7a6000; --s6: #b3264b;
  --s7: #3f6f8f; --s8: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --ink: #e6edf3; --soft: #9da7b3; --line: #3a434d;
  --box: #171d24; --link: #79b8ff; --s1: #6cb6ff; --s2: #f69d50; --s3: #57c99a; --s4: #dc9be0; --s5: #d9bd4a;
  --s6: #ff8fa6; --s7: #9cc5dd; --s8: #a5afba; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main, header, nav { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
h4 { font-size: .9rem; margin: .9rem 0 .2rem; }
p, ul { max-width: 48rem; margin: .5rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; list-style: none; max-width: none; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--page); padding: .3rem .6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem; }
figure { margin: .8rem 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 40rem; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 40rem; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; max-width: 100%; }
caption { text-align: left; color: var(--soft); padding-bottom: .2rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; min-width: 3.2rem; }
td.n { overflow-wrap: normal; }
tbody th { min-width: 4.6rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; background: var(--box); border: 1px solid var(--line); border-radius: 4px; margin: .3rem 0;
  padding: .5rem .7rem; font: 13px/1.45 ui-monospace, monospace; max-height: 24rem; overflow: auto; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding-right: .4rem; } }
@media print { nav { display: none; } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


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


Block = Heading | Text | Table | Figure | Quote


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Block]


def shown(value: str | float | None) -> str:
    """A cell as text: three significant digits, "n/a" for what does not exist."""
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "n/a"
    # With the zeros at the end: 0.660 below 0.661, not 0.66.
    return f"{value:,}" if isinstance(value, int) else f"{value:#.3g}".removesuffix(".")


def printable(text: str) -> str:
    """The text without the control characters that neither HTML nor SVG may hold."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "�", text)


def to_html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    contents = "".join(f'<li><a href="#{_anchor(s.title)}">{_escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(_section(section) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#report">Skip to the report</a>
<header><h1>{_escape(title)}</h1><p>{_inline(lead)}</p></header>
<nav aria-label="Sections"><ul>{contents}</ul></nav>
<main id="report">
{body}
</main>
</body>
</html>
"""


def to_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The same without figures and without what a model wrote."""
    parts = [f"# {title}", lead]
    for section in sections:
        blocks = [text for block in section.blocks if (text := _markdown(block))]
        parts += [f"## {section.title}", *blocks] if blocks else []
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    parts: list[str] = []
    figures: list[str] = []
    for block in [*section.blocks, None]:
        if isinstance(block, Figure):
            figures.append(_figure(block))
            continue
        if figures:
            parts.append(f'<div class="figures">{"".join(figures)}</div>')
            figures = []
        if block is not None:
            parts.append(_block(block))
    anchor = _anchor(section.title)
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{_escape(section.title)}</h2>{"".join(parts)}</section>'
    )


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h3>{_inline(text)}</h3>"
        case Text(text, items):
            points = "".join(f"<li>{_inline(item)}</li>" for item in items)
            return (f"<p>{_inline(text)}</p>" if text else "") + (f"<ul>{points}</ul>" if points else "")
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Quote(title, text, folded):
            # What can scroll has to be reachable by keyboard, and only that.
            focus = ' tabindex="0"' if len(text) > 1000 or text.count("\n") > 15 else ""
            quoted = f"<pre{focus}>{_escape(text)}</pre>"
            if folded:
                return f"<details><summary>{_inline(title)}</summary>{quoted}</details>"
            return f"<h4>{_inline(title)}</h4>{quoted}"


def _figure(figure: Figure) -> str:
    return f"<figure>{figure.svg}<figcaption>{_inline(figure.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    numeric = [not any(isinstance(row[c], str) for row in table.rows) for c in range(len(table.header))]
    kind = [' class="n"' if number else "" for number in numeric]
    head = "".join(f'<th scope="col"{k}>{_inline(name)}</th>' for name, k in zip(table.header, kind, strict=True))
    lines = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{k}>{_inline(shown(cell))}</td>" for cell, k in zip(rest, kind[1:], strict=True))
        lines.append(f'<tr><th scope="row"{kind[0]}>{_inline(shown(first))}</th>{cells}</tr>')
    caption = "" if table.folded else f"<caption>{_inline(table.caption)}</caption>"
    text = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<details><summary>{_inline(table.caption)}</summary>{text}</details>" if table.folded else text


def _markdown(block: Block) -> str:
    match block:
        case Text(text, items):
            return "\n".join([*([text] if text else []), *([""] if text and items else []), *(f"- {i}" for i in items)])
        case Table(caption, header, rows):
            lines = [header, ["---"] * len(header), *([shown(cell) for cell in row] for row in rows)]
            cells = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
            return f"{caption}\n\n{cells}"
    return ""


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))
