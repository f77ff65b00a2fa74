"""Writing files so that each appears whole or not at all, the four files of a report, and reading JSON of others."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from grpo_plus.report.page import Section, to_html, to_markdown

# The first sign of a formula, behind blanks and signs that are not seen; the last four are full-width.
FORMULA = r"\A([\s\pC]*[=+\-@|%\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}])"
JSON_LIMIT = 2**28  # bytes of a JSON file that is read


def write_report(
    folder: str | Path, title: str, lead: str, sections: Sequence[Section], rows: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write report.html, summary.md, results.csv and results.parquet, each whole or not at all; returns their paths.

    Args:
        rows: the numbers, one each, all with the same columns.
    """
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    page, summary = to_html(title, lead, sections), to_markdown(title, lead, sections)
    return write_files(
        folder,
        {
            "report.html": lambda path: path.write_text(page, encoding="utf-8"),
            "summary.md": lambda path: path.write_text(summary, encoding="utf-8"),
            "results.csv": lambda path: pa.csv.write_csv(without_formulas(table), path),
            "results.parquet": lambda path: pq.write_table(table, path),
        },
    )


def without_formulas(table: pa.Table) -> pa.Table:
    """The table with an apostrophe before every text that a spreadsheet would run, such as =1+1."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            cells = pc.replace_substring_regex(table[field.name], FORMULA, r"'\1")
            table = table.set_column(index, field.name, cells)
    return table


def write_files(folder: str | Path, files: dict[str, Callable[[Path], object]]) -> list[Path]:
    """Write files so that each appears whole or not at all.

    Every writer gets a path in a folder of its own. When all files are written, they are moved into place.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        for name, write in files.items():
            write(Path(unfinished, name))
        for name in files:
            os.replace(Path(unfinished, name), folder / name)
    return [folder / name for name in files]


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none: missing, a pipe or a device, very large, or not JSON."""
    try:
        if not path.is_file() or path.stat().st_size > JSON_LIMIT:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return None
