"""The text of prompts and completions in a table.

A prompt or completion is text, or a conversation: a list of messages. Both come out as one string per row, for
comparing, measuring and showing. What Arrow can do for a whole column it does; only messages that hold more than text
(images, tool calls) go through Python.
"""

import json
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
