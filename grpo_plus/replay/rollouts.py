"""What a run generated: the tables that TRL writes with log_completions=True, as batches of rewards.

TRL writes `completions/completions_<step>.parquet` per log: step, prompt, completion, one column per reward function,
whatever was logged with `log_extra`, and the advantage that it trained on. A table holds the run's *last* generation
batch, so a run that logs every tenth batch leaves a tenth of its completions.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from grpo_plus.advantages.checks import check_weights
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.advantages.steps import Steps
from grpo_plus.registry import suggestion
from grpo_plus.replay.columns import cut_groups, group_size, label_size, labelled_groups, numbers, plain_text

NAME = re.compile(r"completions_(\d+)\.parquet")
LENGTH, STEP_COLUMNS = "completion_length", ("step_rewards", "step_ends")
NOT_REWARDS = {"step", "prompt", "completion", "advantage", "group", "task", LENGTH, *STEP_COLUMNS}
READ_AHEAD = 4


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
class Rollouts:
    """The completions that a run logged, read batch by batch in the order of the steps.

    Args:
        run_dir: the run's output_dir, or the folder that holds the parquet files.
        num_generations: G. Where None, what a column `group` says, or else the equal prompts of the first table.
        reward_names: the columns that are rewards. Where None, the functions that a `trainer_state.json` of the run
            names, or else every column of floats that is none of TRL's own.
        reward_weights: as in the run's configuration, one per name in the order of the columns; 1 where None. A log
            does not hold them.

    Attributes:
        findings: what was wrong with the log, by kind; filled while `batches` runs.
        length_unit: what `Rewards.lengths` counts: "tokens" or "characters".

    Raises:
        ValueError: there is nothing to read: no files, no reward columns, no way to tell the groups.
    """

    run_dir: str | Path
    num_generations: int | None = None
    reward_names: Sequence[str] | None = None
    reward_weights: Sequence[float | str] | None = None
    findings: dict[str, Finding] = field(default_factory=dict)
    length_unit: str = "characters"

    def __post_init__(self) -> None:
        if self.num_generations is not None and self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations} leaves nothing to compare. Use the run's own.")
        self.paths = _files(Path(self.run_dir))
        first = self._first_table()
        self.names = self._names_of(first.schema)
        given = [1.0] * len(self.names) if self.reward_weights is None else check_weights(self.reward_weights)
        self.weights = torch.tensor(given, dtype=torch.float64)
        if len(self.weights) != len(self.names):
            raise ValueError(
                f"{len(self.weights)} reward weights were given for the rewards {', '.join(self.names)}. Give one each."
            )
        self.size = self.num_generations or self._size_of(first)
        steps = set(STEP_COLUMNS) <= set(first.schema.names)
        self.length_unit = "tokens" if steps or LENGTH in first.schema.names else "characters"

    def batches(self, *, progress: bool = False) -> Iterator[RolloutBatch]:
        """Every batch that can be used; what cannot is left out and named in `findings`."""
        self.findings.clear()
        before: pa.Table | None = None
        paths = tqdm(self.paths, desc="replay", unit=" tables", disable=not progress)
        for path, table in zip(paths, self._tables(), strict=True):
            if table is None:
                self._note(
                    "unreadable", f"{path.name} is not a whole parquet file and is left out; a killed run does that"
                )
                continue
            if not self._fits(path, table):
                continue
            content = table.drop_columns(["step"]) if "step" in table.column_names else table
            if before is not None and content.equals(before):
                self._note("repeated", f"{path.name} holds the completions of the table before it; they count once")
                continue
            before = content
            for step, rows in self._steps(path, table):
                if (batch := self._batch(path, step, rows)) is not None:
                    yield batch

    def texts(self, batch_path: Path, rows: Sequence[int]) -> list[tuple[str, str]]:
        """Prompt and completion of rows of a file."""
        with pq.ParquetFile(batch_path) as file:
            table = file.read(["prompt", "completion"]).take(list(rows))
        return list(zip(*(plain_text(table[name]).to_pylist() for name in table.column_names), strict=True))

    def _note(self, kind: str, message: str, count: int = 1, unit: str = "tables") -> None:
        self.findings.setdefault(kind, Finding(kind, message, unit=unit)).count += int(count)

    def _first_table(self) -> pa.Table:
        for path in self.paths:
            if (table := _read_table(path, None)) is not None and table.num_rows:
                return table
        raise ValueError(
            f"None of the {len(self.paths)} files under {self.paths[0].parent} is a readable table with completions, "
            f"the first being {self.paths[0].name}. They may have been cut off when the run was killed."
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
        logged = [name for name in _logged_rewards(Path(self.run_dir)) if name in floats]
        if not (logged or floats):
            raise ValueError(
                f"The tables of completions have no reward columns, only {', '.join(schema.names)}. Rewards are "
                "columns of floats, one per reward function; name others with reward_names (--rewards)."
            )
        return tuple(logged or floats)

    def _size_of(self, table: pa.Table) -> int:
        labelled = "group" in table.column_names
        size = label_size(table["group"]) if labelled else group_size(plain_text(table["prompt"]))
        if size is None or size < 2:
            raise ValueError(
                "The log does not say which completions belong together: it has no column 'group', and its prompts do "
                "not come in blocks of equal ones. Give the run's num_generations (--num_generations)."
            )
        return size

    def _tables(self) -> Iterator[pa.Table | None]:
        """The files' tables in order, a few of them read ahead; None for one that cannot be read."""
        wanted = {*NOT_REWARDS, *self.names}
        with ThreadPoolExecutor(1) as pool:
            ahead: deque = deque()
            for path in self.paths:
                ahead.append(pool.submit(_read_table, path, wanted))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _fits(self, path: Path, table: pa.Table) -> bool:
        missing = [name for name in ("prompt", "completion", *self.names) if name not in table.column_names]
        if missing:
            self._note(
                "another run",
                f"{path.name} lacks {', '.join(missing)} and is left out: the tables of two runs, or of two "
                "configurations, seem to share the folder. The rewards that all tables have can be named (--rewards)",
            )
        return not missing and table.num_rows > 0

    def _steps(self, path: Path, table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        """The table's steps; TRL writes one per file, under its name."""
        named = int(NAME.fullmatch(path.name).group(1))  # type: ignore[union-attr]
        found = [named] if "step" not in table.column_names else pc.unique(table["step"]).to_pylist()
        if found != [named]:
            self._note("mixed steps", f"{path.name} holds step {', '.join(map(str, found[:3]))}; its own column counts")
        for step in found:
            whole = len(found) == 1
            yield (named if step is None else step), table if whole else table.filter(pc.equal(table["step"], step))

    def _batch(self, path: Path, step: int, table: pa.Table) -> RolloutBatch | None:
        prompts = plain_text(table["prompt"])
        if "group" in table.column_names and table["group"].null_count < table.num_rows:
            rows, unused = labelled_groups(table["group"], prompts, self.size)
        else:
            rows, unused = cut_groups(prompts, self.size)
        if unused:
            self._note(
                "not in groups",
                f"{path.name}: {unused} of {table.num_rows} completions are in no group of {self.size} with one "
                f"prompt and are left out; {rows.size} are used. Such a table can hold an evaluation's completions, "
                "or the run had another num_generations",
            )
        values = np.stack([numbers(table[name]) for name in self.names], axis=-1)[rows]
        infinite = np.isinf(values).any(axis=(1, 2))
        if infinite.any():
            message = f"{path.name}: {infinite.sum()} of {len(rows)} groups hold one and are left out"
            self._note("infinite rewards", message, infinite.sum(), "groups")
            rows, values = rows[~infinite], values[~infinite]
        if not len(rows):
            return None
        logged = None
        if "advantage" in table.column_names:
            logged = torch.from_numpy(numbers(table["advantage"])[rows])
        return RolloutBatch(path, step, self._rewards(table, prompts, rows, values), logged, rows)

    def _rewards(self, table: pa.Table, prompts: pa.Array, rows: np.ndarray, values: np.ndarray) -> Rewards:
        missing = np.isnan(values)
        for k, name in enumerate(self.names):
            if missing[..., k].any():
                message = f"{name!r} is NaN or missing there: its function abstained, and the others count without it"
                self._note(f"abstentions of {name}", message, missing[..., k].sum(), "completions")
        if missing.all(-1).any():
            message = "no reward function judged them: their advantage is 0, and their group does without them"
            self._note("not judged", message, missing.all(-1).sum(), "completions")
        first = pa.array(rows[:, 0])
        steps = None
        lengths = self._lengths(table)[rows]
        if set(STEP_COLUMNS) <= set(table.column_names):
            flat = table.select(STEP_COLUMNS).take(pa.array(rows.ravel())).to_pydict()
            steps = Steps.from_rows(*flat.values(), lengths=torch.from_numpy(lengths))
        return Rewards(
            values=torch.from_numpy(values),
            weights=self.weights,
            names=self.names,
            lengths=torch.from_numpy(lengths),
            tasks=tuple(map(str, table["task"].take(first).to_pylist())) if "task" in table.column_names else None,
            prompts=tuple(map(_digest, prompts.take(first).to_pylist())),
            steps=steps,
        )

    def _lengths(self, table: pa.Table) -> np.ndarray:
        if LENGTH in table.column_names:
            return np.nan_to_num(numbers(table[LENGTH])).astype(np.int64)
        if set(STEP_COLUMNS) <= set(table.column_names):
            return np.array([max(map(int, ends), default=-1) + 1 for ends in _lists(table["step_ends"])])
        return pc.utf8_length(plain_text(table["completion"])).to_numpy().astype(np.int64)


def _lists(column: pa.ChunkedArray) -> list[list[float]]:
    return [[] if value is None else list(value) for value in column.to_pylist()]


def _digest(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


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


def _read_table(path: Path, wanted: set[str] | None) -> pa.Table | None:
    """A file's table with the columns wanted, or all; None where it is not a whole parquet file."""
    try:
        # A ParquetFile reads this one file; read_table would also look for a dataset around it.
        with pq.ParquetFile(path) as file:
            names = None if wanted is None else [name for name in file.schema_arrow.names if name in wanted]
            return file.read(names, use_threads=False)
    except (pa.ArrowException, OSError):
        return None


def _logged_rewards(run_dir: Path) -> list[str]:
    """The reward functions that a checkpoint's log names."""
    for path in sorted([*run_dir.glob("trainer_state.json"), *run_dir.glob("checkpoint-*/trainer_state.json")]):
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        except (ValueError, KeyError, TypeError, OSError):
            continue
        keys = [key for entry in history if isinstance(entry, Mapping) for key in entry]
        names = [match.group(1) for key in keys if (match := re.fullmatch(r"rewards/(.+)/mean", key))]
        if names:
            return list(dict.fromkeys(names))
    return []
