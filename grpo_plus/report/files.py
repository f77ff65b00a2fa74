"""Writing files so that each appears whole or not at all, and the four files of a report."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from grpo_plus.report.page import Section, to_html, to_markdown


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
            "results.csv": lambda path: pa.csv.write_csv(table, path),
            "results.parquet": lambda path: pq.write_table(table, path),
        },
    )


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
