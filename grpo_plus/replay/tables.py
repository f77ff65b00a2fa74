"""Reading the files of a run that somebody may have sent: regular files of bounded size, with every column once.

A pipe would be waited for without end, and 80 kB of parquet can unpack to gigabytes. What a file unpacks to is known
before the file is read, from its own index.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# What a table may unpack to: 256 MiB, or twenty times its file where that is more. Text packs to about a fifth.
LIMIT, RATIO = 2**28, 20
NUMBER = 8  # bytes that a number takes, and the place of a text
# Encodings that write a long text once and let later rows name it.
SHARING = ("RLE_DICTIONARY", "PLAIN_DICTIONARY", "DELTA_BYTE_ARRAY")

Found = TypeVar("Found")


class TableError(ValueError):
    """A table of completions that cannot be used.

    Attributes:
        kind: what is wrong, in a word or two.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_table(path: Path, wanted: Collection[str] | None) -> pa.Table:
    """Read the wanted columns of a parquet file, or all.

    Raises:
        TableError: the path is no regular file or no whole parquet file, a wanted column is there twice, or the columns
            would unpack to more than the limit.
    """
    if not path.is_file():
        raise TableError("no files", f"{path.name} is a pipe, a device or a folder, and is left out")
    try:
        # A ParquetFile reads this one file; read_table would also look for a dataset around it.
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
            for name in names:
                if names.count(name) > 1:
                    raise TableError("columns", f"{path.name} has the column {name!r} {names.count(name)} times")
            _check_size(path, file, names)
            return file.read(names, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        message = f"{path.name} is not a whole parquet file and is left out; a killed run does that"
        raise TableError("unreadable", message) from error


def _check_size(path: Path, file: pq.ParquetFile, names: list[str]) -> None:
    limit = max(LIMIT, RATIO * path.stat().st_size)
    numbers, texts, longest = 0, 0, 1
    for chunk in _chunks(file.metadata, names):
        numbers += chunk.num_values * NUMBER
        shares = chunk.physical_type == "BYTE_ARRAY" and not set(SHARING).isdisjoint(chunk.encodings)
        texts += chunk.total_uncompressed_size * (chunk.num_values if shares else 1)
        longest = max(longest, chunk.total_uncompressed_size)
    size = numbers
    if numbers <= limit < numbers + texts:
        # Texts may be shared by rows, so they are counted as they unpack, a few rows at a time.
        rows = max(1, min(1024, limit // longest))
        for batch in file.iter_batches(batch_size=rows, columns=names, use_threads=False):
            size += batch.nbytes
            if size > limit:
                break
    if size > limit:
        raise TableError(
            "too large",
            f"{path.name} has {path.stat().st_size:,} bytes and would unpack to more than {limit:,}; it is left out",
        )


def _chunks(metadata: pq.FileMetaData, names: list[str]) -> list[pq.ColumnChunkMetaData]:
    """The parts of the file that hold the columns `names`, or what is inside them."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    inside = tuple(f"{name}." for name in names)
    return [c for c in chunks if c.path_in_schema in names or c.path_in_schema.startswith(inside)]


def converted(path: Path, table: pa.Table, name: str, convert: Callable[[pa.ChunkedArray], Found]) -> Found:
    """A column as `convert` reads it.

    Raises:
        TableError: the column holds something else; names the file and the column.
    """
    try:
        return convert(table[name])
    except (ValueError, TypeError, OverflowError, ArithmeticError, pa.ArrowException) as error:
        raise TableError("columns", f"{path.name}: the column {name!r} cannot be used: {error}") from error


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64, NaN where the table holds nothing."""
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise ValueError(f"it holds {kind}, and no numbers")
    return column.cast(pa.float64(), safe=False).to_numpy()


def counts(column: pa.ChunkedArray) -> np.ndarray:
    """int64 numbers of tokens, 0 where the table holds nothing."""
    values = np.nan_to_num(numbers(column), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if len(values) and not (values.min() >= 0 and values.max() < 2**31):
        raise ValueError(
            f"it goes from {values.min():g} to {values.max():g}, where numbers of tokens are from 0 to 2**31"
        )
    return values.astype(np.int64)
