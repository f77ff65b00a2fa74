"""What a run generated: the tables that TRL writes with log_completions=True, as batches of rewards.

TRL writes `completions/completions_<step>.parquet` per log: step, prompt, completion, one column per reward function,
whatever was logged with `log_extra`, and the advantage that it trained on. A table holds the run's *last* generation
batch, so a run that logs every tenth batch leaves a tenth of its completions.
"""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from grpo_plus.advantages.checks import check_weights
from grpo_plus.registry import suggestion
from grpo_plus.replay.batches import (
    NAME,
    Finding,
    RolloutBatch,
    TableReader,
    has_steps,
)
from grpo_plus.replay.columns import plain_text
from grpo_plus.replay.grouping import Sample, Size, label_size, logged_dead, size_of_groups
from grpo_plus.replay.tables import TableError, converted, numbers, read_table
from grpo_plus.report.completions import LENGTH, NOT_REWARDS, as_text
from grpo_plus.report.files import read_json
from grpo_plus.report.run_file import RunRecord, read_run

READ_AHEAD = 4
SAMPLED = 16  # tables that are asked for the size of the groups


@dataclass(eq=False)
class Rollouts:
    """The completions that a run logged, read batch by batch in the order of the steps.

    Args:
        run_dir: the run's output_dir, or the folder that holds the parquet files.
        num_generations: G. Where None: what the run recorded, or a column `group` says, or the tables show.
        reward_names: the columns that are rewards. Where None: the functions that the run recorded or that a
            `trainer_state.json` names, or else every column of floats that is none of TRL's own.
        reward_weights: as in the run's configuration, one per name in the order of the columns. Where None: what the
            run recorded, or else 1. A log does not hold them.

    Attributes:
        record: what a run of ours recorded of itself; None for TRL's own runs.
        names, weights: the rewards.
        size: G.
        findings: what was wrong with the log, by kind; filled while `batches` runs.
        length_unit: what `Rewards.lengths` counts: "tokens" or "characters".

    Raises:
        ValueError: there is nothing to read: no files, no reward columns, no way to tell the groups.
    """

    run_dir: str | Path
    num_generations: int | None = None
    reward_names: Sequence[str] | None = None
    reward_weights: Sequence[float | str] | None = None

    def __post_init__(self) -> None:
        if self.num_generations is not None and self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations} leaves nothing to compare. Use the run's own.")
        self.paths = _files(Path(self.run_dir))
        self.record: RunRecord | None = next(filter(None, map(read_run, self._run_folders)), None)
        path, first = self._first_table()
        self.names = self._names_of(first.schema)
        self.weights = torch.tensor(self._weights(), dtype=torch.float64)
        self.group_size = self._size_of(path, first)
        self.size = self.group_size.value
        steps = has_steps(first.schema.names)
        self.length_unit = "tokens" if steps or LENGTH in first.schema.names else "characters"
        self.reader = TableReader(self.names, self.weights, self.size, size_is_given=self._given_size is not None)

    @property
    def findings(self) -> dict[str, Finding]:
        """What was wrong with the log, by kind."""
        return self.reader.findings

    def batches(self, *, progress: bool = False) -> Iterator[RolloutBatch]:
        """Every batch that can be used; what cannot is left out and named in `findings`."""
        self.findings.clear()
        before: pa.Table | None = None
        paths = tqdm(self.paths, desc="replay", unit=" tables", disable=not progress)
        for path, table in zip(paths, self._tables(), strict=True):
            if isinstance(table, TableError):
                self.reader.note(table.kind, str(table))
                continue
            if not self._fits(path, table):
                continue
            content = table.drop_columns(["step"]) if "step" in table.column_names else table
            if before is not None and content.equals(before):
                message = f"{path.name} holds the completions of the table before it; they count once"
                self.reader.note("repeated", message)
                continue
            before = content
            try:
                found = list(self.reader.batches(path, table))
            except TableError as error:
                self.reader.note(error.kind, f"{error}. The table is left out")
                continue
            yield from found

    def texts(self, batch_path: Path, rows: Sequence[int]) -> list[tuple[str, str]]:
        """Prompt and completion of rows of a file."""
        table = read_table(batch_path, ("prompt", "completion")).take(list(rows))
        return list(zip(*(map(as_text, table[name].to_pylist()) for name in ("prompt", "completion")), strict=True))

    @property
    def _run_folders(self) -> list[Path]:
        """Where the run's own files are: the run's folder, or the one above the folder of its tables."""
        folder = Path(self.run_dir)
        return [folder, folder.resolve().parent] if folder.resolve().name == "completions" else [folder]

    @cached_property
    def _history(self) -> list[Mapping[str, Any]]:
        """The log of the run's trainer; empty where no checkpoint holds one."""
        patterns = ("trainer_state.json", "checkpoint-*/trainer_state.json")
        for path in sorted(path for folder in self._run_folders for name in patterns for path in folder.glob(name)):
            state = read_json(path)
            history = state.get("log_history") if isinstance(state, dict) else None
            entries = [entry for entry in history if isinstance(entry, Mapping)] if isinstance(history, list) else []
            if entries:
                return entries
        return []

    @property
    def _given_size(self) -> Size | None:
        """G where somebody has said it."""
        if self.num_generations is not None:
            return Size(self.num_generations, "as given")
        recorded = self.record.num_generations if self.record is not None else None
        return None if recorded is None else Size(recorded, "as the run recorded")

    def _first_table(self) -> tuple[Path, pa.Table]:
        """The first table with completions."""
        errors = []
        for path in self.paths:
            try:
                table = read_table(path, None)
            except TableError as error:
                errors.append(error)
                continue
            missing = [name for name in ("prompt", "completion") if name not in table.column_names]
            if missing:
                errors.append(TableError("columns", f"{path.name} has no column {missing[0]!r}"))
            elif table.num_rows:
                return path, table
        first = f" {errors[0]}." if errors else ""
        raise ValueError(
            f"None of the {len(self.paths)} files under {self.paths[0].parent} is a readable table with completions."
            f"{first} They may have been cut off when the run was killed."
        )

    def _names_of(self, schema: pa.Schema) -> tuple[str, ...]:
        floats = [entry.name for entry in schema if pa.types.is_floating(entry.type) and entry.name not in NOT_REWARDS]
        if self.reward_names is not None:
            if not self.reward_names:
                raise ValueError("reward_names is empty. Name at least one column, or leave it unset.")
            for name in self.reward_names:
                if name not in schema.names:
                    raise ValueError(f"The log has no column {name!r}.{suggestion(name, floats)}")
            return tuple(self.reward_names)
        recorded = self.record.rewards if self.record is not None else ()
        logged = [name for name in recorded if name in floats] or [name for name in self._logged if name in floats]
        if not (logged or floats):
            raise ValueError(
                f"The tables of completions have no reward columns, only {', '.join(schema.names)}. Rewards are "
                "columns of floats, one per reward function; name others with reward_names (--rewards)."
            )
        return tuple(logged or floats)

    @property
    def _logged(self) -> list[str]:
        """The reward functions that a checkpoint's log names."""
        keys = [key for entry in self._history for key in entry]
        return list(dict.fromkeys(m.group(1) for key in keys if (m := re.fullmatch(r"rewards/(.+)/mean", key))))

    def _weights(self) -> list[float]:
        if self.reward_weights is None:
            recorded = self.record.rewards if self.record is not None else {}
            return [recorded.get(name, 1.0) for name in self.names]
        weights = check_weights(self.reward_weights)
        if len(weights) != len(self.names):
            raise ValueError(
                f"{len(weights)} reward weights were given for the rewards {', '.join(self.names)}. Give one each."
            )
        return weights

    def _size_of(self, path: Path, table: pa.Table) -> Size:
        if (given := self._given_size) is not None:
            return given
        if "group" in table.column_names:
            size = converted(path, table, "group", label_size)
            if size is not None and size > 1:
                return Size(size, "the column 'group'")
        dead = logged_dead(self._history)
        samples = []
        for other in self.paths:
            try:
                samples.append(self._sample(other, read_table(other, {*NOT_REWARDS, *self.names}), dead))
            except (TableError, KeyError):  # left out, and named, when the log is read
                continue
            if len(samples) == SAMPLED or len(set(samples[-1].prompts.to_pylist())) > 1:
                break
        return size_of_groups([sample for sample in samples if len(sample.prompts)])

    def _sample(self, path: Path, table: pa.Table, dead: Mapping[int, float]) -> Sample:
        columns = {
            name: converted(path, table, name, numbers)
            for name in (*self.names, "advantage")
            if name in table.column_names or name != "advantage"
        }
        values = np.stack([columns[name] for name in self.names], axis=-1)
        judged = ~np.isnan(values).all(-1)
        total = np.where(judged, np.nansum(values * self.weights.numpy(), axis=-1), np.nan)
        step = int(NAME.fullmatch(path.name).group(1))  # type: ignore[union-attr]
        prompts = converted(path, table, "prompt", plain_text)
        return Sample(prompts, total, columns.get("advantage"), dead.get(step))

    def _tables(self) -> Iterator[pa.Table | TableError]:
        """The files' tables in order, a few of them read ahead; the reason in place of one that cannot be read."""
        wanted = {*NOT_REWARDS, *self.names}
        with ThreadPoolExecutor(1) as pool:
            ahead: deque = deque()
            for path in self.paths:
                ahead.append(pool.submit(_table_or_error, path, wanted))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _fits(self, path: Path, table: pa.Table) -> bool:
        missing = [name for name in ("prompt", "completion", *self.names) if name not in table.column_names]
        if missing:
            self.reader.note(
                "another run",
                f"{path.name} lacks {', '.join(missing)} and is left out: the tables of two runs, or of two "
                "configurations, seem to share the folder. The rewards that all tables have can be named (--rewards)",
            )
        return not missing and table.num_rows > 0


def _table_or_error(path: Path, wanted: set[str]) -> pa.Table | TableError:
    try:
        return read_table(path, wanted)
    except TableError as error:
        return error


def _files(run_dir: Path) -> list[Path]:
    """The tables of completions under a run, by step."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is no folder. Give the output_dir of a run with log_completions=True.")
    folders = (run_dir / "completions", run_dir)
    found = {path: NAME.fullmatch(path.name) for folder in folders for path in folder.glob("completions_*.parquet")}
    steps = {path: int(match.group(1)) for path, match in found.items() if match}
    if not steps:
        raise ValueError(
            f"{run_dir} has no completions/completions_<step>.parquet. TRL writes them with log_completions=True, at "
            "every log (logging_steps)."
        )
    return sorted(steps, key=lambda path: (steps[path], path))
