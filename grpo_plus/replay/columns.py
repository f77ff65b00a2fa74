"""Columns of a table of completions: text of prompts and completions, and where the groups are.

A prompt or completion is text, or a conversation: a list of messages. Both come out as one string per row, for
comparing, measuring and showing. What Arrow can do for a whole column it does; only messages that hold more than text
(images, tool calls) go through Python.
"""

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SEPARATOR = "\n"


def plain_text(column: pa.ChunkedArray) -> pa.Array:
    """One string per row; of a conversation, "role: content" line by line."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # older releases of pyarrow keep a single chunk wrapped
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    if _is_text(array.type):
        return pc.fill_null(array.cast(pa.large_string()), "")
    if _is_conversation(array.type):
        messages = array.flatten()
        lines = pc.binary_join_element_wise(
            *(pc.struct_field(messages, name).cast(pa.string()) for name in ("role", "content")),
            ": ",
            null_handling="replace",
            null_replacement="",
        )
        ends = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int32())
        offsets = np.concatenate([[0], np.cumsum(ends)]).astype(np.int32)
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), lines), SEPARATOR)
        return pc.fill_null(joined.cast(pa.large_string()), "")
    return pa.array([_shown(value) for value in array.to_pylist()], pa.large_string())


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_conversation(kind: pa.DataType) -> bool:
    """Whether messages are a role and a text each, and nothing else."""
    if not (pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return set(fields) == {"role", "content"} and all(map(_is_text, fields.values()))


def _shown(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64, NaN where the table holds nothing."""
    return column.cast(pa.float64()).to_numpy()


def starts_of_runs(prompts: pa.Array) -> np.ndarray:
    """The rows whose prompt is not that of the row before, and the number of rows at the end."""
    if len(prompts) == 0:
        return np.array([0])
    differs = pc.not_equal(prompts.slice(1), prompts.slice(0, len(prompts) - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(differs) + 1, [len(prompts)]])


def group_size(prompts: pa.Array) -> int | None:
    """The largest G for which every run of equal prompts is whole groups of G; None where the prompts do not say."""
    runs = np.diff(starts_of_runs(prompts))
    size = math.gcd(*runs.tolist()) if len(runs) > 1 else 0
    return size if size > 1 else None


def cut_groups(prompts: pa.Array, size: int) -> tuple[np.ndarray, int]:
    """Cut rows in order into groups of `size` equal prompts.

    Returns:
        (P, size) rows of the groups, and how many rows are in none: a run of equal prompts that is not a multiple of
        `size` could be cut in several ways, so none of it is used.
    """
    starts = starts_of_runs(prompts)
    lengths = np.diff(starts)
    whole = lengths % size == 0
    rows = np.concatenate(
        [np.arange(start, start + length) for start, length in zip(starts[:-1][whole], lengths[whole], strict=True)]
        or [np.array([], dtype=np.int64)]
    )
    return rows.reshape(-1, size), len(prompts) - len(rows)


def labelled_groups(labels: pa.ChunkedArray, prompts: pa.Array, size: int) -> tuple[np.ndarray, int]:
    """The groups that a column `group` names, as `cut_groups`; without those of another size or of several prompts."""
    values = numbers(labels)
    order = np.argsort(values, kind="stable")
    order = order[~np.isnan(values[order])]
    edges = np.flatnonzero(np.diff(values[order])) + 1
    texts = prompts.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    groups = [rows for rows in np.split(order, edges) if len(rows) == size and (texts[rows] == texts[rows[0]]).all()]
    # In the order of the log, which is the order of the batch.
    groups.sort(key=lambda rows: rows[0])
    used = np.array(groups, dtype=np.int64).reshape(-1, size)
    return used, len(values) - used.size


def label_size(labels: pa.ChunkedArray) -> int | None:
    """The most common number of rows of one label; None without labels."""
    values = numbers(labels)
    sizes = Counter(np.unique(values[~np.isnan(values)], return_counts=True)[1].tolist())
    return sizes.most_common(1)[0][0] if sizes else None
