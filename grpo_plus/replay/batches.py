"""One table of completions as generation batches: its groups, its rewards, and what a reader should know of it."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from grpo_plus.advantages.rewards import Rewards
from grpo_plus.advantages.steps import Steps
from grpo_plus.replay.columns import plain_text
from grpo_plus.replay.grouping import cut_groups, labelled_groups, shows_no_groups
from grpo_plus.replay.tables import TableError, converted, counts, numbers
from grpo_plus.report.completions import LENGTH, STATES, STEP_COLUMNS

NAME = re.compile(r"completions_(\d+)\.parquet")
LARGEST = torch.finfo(torch.float32).max  # of a reward: the trainer computes in float32


@dataclass
class Finding:
    """Something about the log that a reader of the numbers should know.

    Attributes:
        kind: what it is, in a few words; one finding per kind.
        first: the first place, and what is still usable.
        count: how many `unit`.
    """

    kind: str
    first: str
    count: int = 0
    unit: str = "tables"


@dataclass(frozen=True)
class RolloutBatch:
    """One generation batch of the log.

    Attributes:
        path: its file.
        step: the optimizer step at which it was logged.
        rewards: lengths are those of a column `completion_length`, or of the last step's end, or characters.
        logged: (P, G) the advantages that the run trained on; None where the table has none.
        rows: (P, G) where each completion is in the file.
    """

    path: Path
    step: int
    rewards: Rewards
    logged: Tensor | None
    rows: np.ndarray


@dataclass(eq=False)
class TableReader:
    """Turns tables into batches.

    Args:
        names: the columns that are rewards.
        weights: (K,) their weights.
        size: G.
        size_is_given: whether somebody has said G. Rows are then cut in order where prompts show no groups.

    Attributes:
        findings: what was wrong with the tables, by kind.
    """

    names: tuple[str, ...]
    weights: Tensor
    size: int
    size_is_given: bool = False
    findings: dict[str, Finding] = field(default_factory=dict)

    def note(self, kind: str, message: str, count: int = 1, unit: str = "tables") -> None:
        """Count a finding, and keep the first message of its kind."""
        self.findings.setdefault(kind, Finding(kind, message, unit=unit)).count += int(count)

    def batches(self, path: Path, table: pa.Table) -> Iterator[RolloutBatch]:
        """The batches of a table.

        Raises:
            TableError: a column holds what it should not.
        """
        for step, rows in self._steps(path, table):
            if (batch := self._batch(path, step, rows)) is not None:
                yield batch

    def _steps(self, path: Path, table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        """The table's steps; TRL writes one per file, under its name."""
        named = int(NAME.fullmatch(path.name).group(1))  # type: ignore[union-attr]
        found = [named] if "step" not in table.column_names else converted(path, table, "step", _whole_numbers)
        if found != [named]:
            self.note("mixed steps", f"{path.name} holds step {', '.join(map(str, found[:3]))}; its own column counts")
        if len(found) == 1:
            yield (named if found[0] is None else found[0]), table
            return
        codes = pc.index_in(table["step"], pa.array(found, table["step"].type)).to_numpy()
        order = np.argsort(codes, kind="stable")
        for step, rows in zip(found, np.split(order, np.flatnonzero(np.diff(codes[order])) + 1), strict=True):
            yield (named if step is None else step), table.take(pa.array(rows))

    def _batch(self, path: Path, step: int, table: pa.Table) -> RolloutBatch | None:
        prompts = converted(path, table, "prompt", plain_text)
        rows = self._groups(path, table, prompts)
        values = np.stack([converted(path, table, name, numbers) for name in self.names], axis=-1)[rows]
        logged = None
        if "advantage" in table.column_names:
            logged = converted(path, table, "advantage", numbers)[rows]
        for what, numbers_of in (("rewards", values), ("advantages", logged)):
            if numbers_of is None:
                continue
            infinite = (np.abs(numbers_of) > LARGEST).any(axis=tuple(range(1, numbers_of.ndim)))
            if infinite.any():
                message = f"{path.name}: {infinite.sum()} of {len(rows)} groups hold one and are left out"
                self.note(f"infinite {what}", message, infinite.sum(), "groups")
                rows, values = rows[~infinite], values[~infinite]
                logged = None if logged is None else logged[~infinite]
        if not len(rows):
            return None
        rewards = self._rewards(path, table, prompts, rows, values)
        return RolloutBatch(path, step, rewards, None if logged is None else torch.from_numpy(logged), rows)

    def _groups(self, path: Path, table: pa.Table, prompts: pa.Array) -> np.ndarray:
        """(P, G) rows of the groups."""
        labelled = "group" in table.column_names and table["group"].null_count < table.num_rows
        own_prompts = shows_no_groups(prompts, self.size)
        if labelled:

            def by_label(labels: pa.ChunkedArray) -> tuple[np.ndarray, int]:
                return labelled_groups(labels, prompts, self.size, mixed=own_prompts)

            rows, unused = converted(path, table, "group", by_label)
        elif own_prompts and self.size_is_given:
            rows, unused = np.arange(table.num_rows).reshape(-1, self.size), 0
        else:
            rows, unused = cut_groups(prompts, self.size)
            own_prompts = False
        if own_prompts:
            self.note(
                "cut in order",
                f"{path.name}: the prompts show no groups, as where an environment gives each completion its own "
                f"observation. The completions are cut into groups of {self.size} "
                f"{'by the column group' if labelled else 'in the order of the table'}",
            )
        if unused:
            self.note(
                "not in groups",
                f"{path.name}: {unused} of {table.num_rows} completions are in no group of {self.size} with one "
                f"prompt and are left out; {rows.size} are used. Such a table can hold an evaluation's completions, "
                "or the run had another num_generations",
            )
        return rows

    def _rewards(self, path: Path, table: pa.Table, prompts: pa.Array, rows: np.ndarray, values: np.ndarray) -> Rewards:
        missing = np.isnan(values)
        for k, name in enumerate(self.names):
            if missing[..., k].any():
                message = f"{name!r} is NaN or missing there: its function abstained, and the others count without it"
                self.note(f"abstentions of {name}", message, missing[..., k].sum(), "completions")
        if missing.all(-1).any():
            message = "no reward function judged them: their advantage is 0, and their group does without them"
            self.note("not judged", message, missing.all(-1).sum(), "completions")
        first = pa.array(rows[:, 0])
        lengths = torch.from_numpy(lengths_of(path, table)[rows])
        return Rewards(
            values=torch.from_numpy(values),
            weights=self.weights,
            names=self.names,
            lengths=lengths,
            tasks=tuple(map(str, table["task"].take(first).to_pylist())) if "task" in table.column_names else None,
            prompts=tuple(map(_digest, prompts.take(first).to_pylist())),
            steps=_steps_of(path, table, rows, lengths),
        )


def has_steps(names: list[str]) -> bool:
    """Whether a table with these columns holds steps: their ends, and their rewards or the states they start from."""
    rewards, ends = STEP_COLUMNS
    return ends in names and (rewards in names or STATES in names)


def lengths_of(path: Path, table: pa.Table) -> np.ndarray:
    """(B,) lengths of the completions: in tokens where the table says so, else in characters."""
    if LENGTH in table.column_names:
        return converted(path, table, LENGTH, counts)
    if has_steps(table.column_names):
        return converted(path, table, STEP_COLUMNS[1], _last_ends)
    texts = converted(path, table, "completion", plain_text)
    return pc.utf8_length(texts).to_numpy().astype(np.int64)


def _steps_of(path: Path, table: pa.Table, rows: np.ndarray, lengths: Tensor) -> Steps | None:
    if not has_steps(table.column_names):
        return None
    names = [name for name in (*STEP_COLUMNS, STATES) if name in table.column_names]
    flat = table.select(names).take(pa.array(rows.ravel())).to_pydict()
    rewards, ends, states = (flat.get(name) for name in (*STEP_COLUMNS, STATES))
    try:
        return Steps.from_rows(rewards or [None] * rows.size, ends, states, lengths=lengths)
    except (ValueError, TypeError, OverflowError) as error:
        columns = " and ".join(map(repr, names))
        raise TableError("columns", f"{path.name}: the columns {columns} cannot be used: {error}") from error


def _whole_numbers(column: pa.ChunkedArray) -> list[int | None]:
    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"it holds {column.type}, and no whole numbers")
    found: list[int | None] = pc.unique(column).to_pylist()
    return found


def _last_ends(column: pa.ChunkedArray) -> np.ndarray:
    rows = [[] if value is None else list(value) for value in column.to_pylist()]
    ends = np.array([max(map(int, row), default=-1) + 1 for row in rows], dtype=np.float64)
    return counts(pa.chunked_array([pa.array(ends)]))


def _digest(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
