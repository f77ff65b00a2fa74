"""Which completions of a log belong together: the size of its groups, from the log's own evidence, and their rows.

TRL writes a generation batch in the order of its groups, G completions of one prompt each. Where a table shows several
prompts, their runs say G. With TRL's default sizes a table is one group and shows one prompt, and then other things
speak: the advantages, which sum to 0 in a group, the share of dead groups that the trainer has logged, and the prompts
of the other tables.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grpo_plus.replay.tables import numbers

CLOSE = 1e-3  # relative; TRL computes in float32, with 1e-4 beside the standard deviation
FLAT = 1e-6


@dataclass(frozen=True)
class Sample:
    """A table's part in the search for G.

    Attributes:
        prompts: one text per row.
        total: (B,) the weighted sums of the rewards, NaN where none judged.
        advantages: (B,) as logged; None where the table has none.
        dead: the share of groups with equal rewards, as the trainer logged it at this step; None where it did not.
    """

    prompts: pa.Array
    total: np.ndarray
    advantages: np.ndarray | None = None
    dead: float | None = None


@dataclass(frozen=True)
class Size:
    """G, and in a few words what says so."""

    value: int
    reason: str


def starts_of_runs(prompts: pa.Array) -> np.ndarray:
    """The rows whose prompt is not that of the row before, and the number of rows at the end."""
    if len(prompts) == 0:
        return np.array([0])
    differs = pc.not_equal(prompts.slice(1), prompts.slice(0, len(prompts) - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(differs) + 1, [len(prompts)]])


def size_of_groups(samples: Sequence[Sample]) -> Size:
    """G of a log without a column `group`.

    Raises:
        ValueError: the log does not say; asks for what it leaves open.
    """
    runs = [np.diff(starts_of_runs(sample.prompts)).tolist() for sample in samples]
    several = next((lengths for lengths in runs if len(lengths) > 1), None)
    if several is not None:
        if (size := math.gcd(*several)) < 2:
            raise ValueError(
                "The log does not say which completions belong together: it has no column 'group', and its prompts do "
                "not come in blocks of equal ones, as where an environment gives each completion its own observation. "
                "Give the run's num_generations (--num_generations): the completions are then cut in order."
            )
        return Size(size, "the runs of equal prompts")
    return _size_of_single_prompts(samples, math.gcd(*(lengths[0] for lengths in runs)))


def _size_of_single_prompts(samples: Sequence[Sample], rows: int) -> Size:
    """G where every table shows one prompt, `rows` times or a multiple of it."""
    possible = [size for size in range(2, rows + 1) if rows % size == 0]
    if len(possible) == 1:
        return Size(rows, f"{rows} completions of one prompt per table")
    fitting = [size for size in possible if all(_explains_advantages(sample, size) for sample in samples)]
    judged = any(
        sample.advantages is not None and np.ptp(sample.total[~np.isnan(sample.total)]) > 0 for sample in samples
    )
    if judged and len(fitting) == 1:
        return Size(fitting[0], "the advantages, which are those of its groups")
    left = fitting or possible
    telling = [sample for sample in samples if sample.dead is not None and 0 < sample.dead < 1]
    matching = [size for size in left if all(_explains_dead(sample, size) for sample in telling)]
    if telling and len(matching) == 1:
        return Size(matching[0], "frac_reward_zero_std in trainer_state.json")
    first_prompts = {sample.prompts[0].as_py() for sample in samples}
    if len(first_prompts) > 1 and rows in left and {len(sample.prompts) for sample in samples} == {rows}:
        return Size(rows, "one prompt per table, and another one in the next")
    raise ValueError(
        f"The log leaves open how large its groups are: each of its tables holds one prompt only, {rows} times. Give "
        f"the run's num_generations (--num_generations): {', '.join(map(str, left))} are possible, and {rows} is a "
        "single group per table, as with TRL's defaults."
    )


def _explains_advantages(sample: Sample, size: int) -> bool:
    """Whether each group's advantages are its centered rewards, times a number that is not below 0."""
    if sample.advantages is None or len(sample.total) % size:
        return True
    rewards, advantages = (np.nan_to_num(values).reshape(-1, size) for values in (sample.total, sample.advantages))
    if np.isnan(sample.total).any():
        return True
    centered = rewards - rewards.mean(1, keepdims=True)
    scale = (centered * advantages).sum(1) / np.maximum((centered**2).sum(1), np.finfo(float).tiny)
    flat = np.abs(centered).max(1) < FLAT
    expected = np.where(flat, 0.0, np.maximum(scale, 0.0))[:, None] * centered
    # Of a flat group TRL keeps rounding over 1e-4, which is no evidence.
    off = np.abs(advantages - expected) * ~(flat[:, None] & (np.abs(advantages) < 1e-2))
    return bool(off.max() <= CLOSE * max(np.abs(advantages).max(), 1e-6))


def _explains_dead(sample: Sample, size: int) -> bool:
    """Whether groups of `size` have equal rewards as often as the trainer says."""
    if sample.dead is None or len(sample.total) % size or np.isnan(sample.total).any():
        return True
    dead = (np.ptp(sample.total.reshape(-1, size), axis=1) < FLAT).mean()
    return bool(abs(dead - sample.dead) <= CLOSE)


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


def shows_no_groups(prompts: pa.Array, size: int) -> bool:
    """Whether the rows are whole groups of `size` by their number, and their prompts speak for no groups at all."""
    lengths = np.diff(starts_of_runs(prompts)).tolist()
    if len(prompts) == 0 or len(prompts) % size or math.gcd(*lengths) > 1:
        return False
    return sum(length for length in lengths if length % size == 0) * 2 < len(prompts)


def labelled_groups(
    labels: pa.ChunkedArray, prompts: pa.Array, size: int, *, mixed: bool = False
) -> tuple[np.ndarray, int]:
    """The groups that a column `group` names, as `cut_groups`; without those of another size or of several prompts.

    Args:
        mixed: whether a group may hold several prompts.
    """
    values = numbers(labels)
    order = np.argsort(values, kind="stable")
    order = order[~np.isnan(values[order])]
    edges = np.flatnonzero(np.diff(values[order])) + 1
    texts = prompts.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    groups = [rows for rows in np.split(order, edges) if len(rows) == size]
    alike = [rows for rows in groups if mixed or (texts[rows] == texts[rows[0]]).all()]
    # In the order of the log, which is the order of the batch.
    alike.sort(key=lambda rows: rows[0])
    used = np.array(alike, dtype=np.int64).reshape(-1, size)
    return used, len(values) - used.size


def label_size(labels: pa.ChunkedArray) -> int | None:
    """The most common number of rows of one label; None without labels."""
    values = numbers(labels)
    sizes = Counter(np.unique(values[~np.isnan(values)], return_counts=True)[1].tolist())
    return sizes.most_common(1)[0][0] if sizes else None


def logged_dead(history: Sequence[Mapping[str, object]]) -> dict[int, float]:
    """The share of dead groups by step, of a trainer's log."""
    found = {entry.get("step"): entry.get("frac_reward_zero_std") for entry in history}
    return {
        step: float(share)
        for step, share in found.items()
        if isinstance(step, int) and isinstance(share, int | float) and math.isfinite(share)
    }
