"""The README's tables, made from the registries: `python -m tests.readme` writes them into README.md."""

import re
from pathlib import Path

from grpo_plus.cli.ls import advantage_rows, loss_rows

README = Path(__file__).parents[1] / "README.md"
TABLES = {"advantages": advantage_rows, "losses": loss_rows}


def markdown(rows: list[tuple[str, ...]]) -> str:
    header, *body = rows
    lines = [header, ("---",) * len(header), *[(f"`{name}`", *map(_cell, rest)) for name, *rest in body]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    if text.startswith("https://"):
        label = text.rpartition("/")[2]
        return f"[{label if '.' in label else f'TRL #{label}'}]({text})"
    return f"`{text}`" if re.fullmatch(r"\w+=\S+(, \w+=\S+)*", text) else text


def block(kind: str) -> str:
    return f"<!-- {kind} -->\n{markdown(TABLES[kind]())}\n<!-- /{kind} -->"


def rendered(text: str) -> str:
    """`text` with its generated tables up to date."""
    for kind in TABLES:
        text = re.sub(rf"<!-- {kind} -->.*<!-- /{kind} -->", lambda _, kind=kind: block(kind), text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
