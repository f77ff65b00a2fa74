"""Add the groups to the tables of completions that any GRPO run writes, TRL's or ours."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

Logs = dict[str, Any]


class AdvantageTableCallback(TrainerCallback):
    """Adds `group`, the index of the row's prompt in its batch, to the tables of completions that TRL writes.

    With log_completions=True, TRL writes a parquet file per log under output_dir/completions. The group says which
    completions competed with each other. A column that a file already has is left alone, such as the `task` that
    GRPOPlusTrainer writes where task_column is set.

    Args:
        task_of: from a prompt as the table holds it (text, or a list of messages) to its task, for a column `task`.
            None adds no such column.
    """

    _logged_at: int
    _mixed: bool
    _unlogged: bool

    def __init__(self, task_of: Callable[[Any], str] | None = None) -> None:
        self.task_of = task_of
        self._refused: set[Path] = set()
        self._start(0)

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Say at the start if there will be no tables."""
        self._start(state.global_step)
        if state.is_world_process_zero and not getattr(args, "log_completions", False):
            warnings.warn(
                "AdvantageTableCallback has no tables to complete. Set log_completions=True, or remove the callback.",
                stacklevel=2,
            )

    def on_log(self, args: Arguments, state: State, control: Control, logs: Logs | None = None, **kwargs: Any) -> None:
        """Notice whether new completions have replaced the completions of an evaluation."""
        if "loss" not in (logs or {}):
            return  # not a log of training steps
        if "reward" in (logs or {}) and not self._unlogged:
            self._mixed = False
        self._unlogged = False
        self._logged_at = state.global_step

    # TRL writes a step's table right after on_log, so each of the next events finds the table complete.
    def on_step_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Complete the table of the step before."""
        self._complete(args, state)

    def on_evaluate(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Complete the table that the evaluation wrote in place of the step's."""
        self._mixed = True
        self._unlogged = self._logged_at != state.global_step
        self._complete(args, state)

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Complete the last table."""
        self._complete(args, state)

    def _start(self, step: int) -> None:
        self._logged_at = step
        self._mixed = False  # whether the table may hold rows of an evaluation
        self._unlogged = False  # whether the next log may tell of completions from before an evaluation

    def _complete(self, args: Arguments, state: State) -> None:
        path = Path(args.output_dir, "completions", f"completions_{state.global_step:05d}.parquet")
        if not (state.is_world_process_zero and getattr(args, "log_completions", False) and path.exists()):
            return
        present = set(pq.read_schema(path).names)
        wanted = {"group"} if self.task_of is None else {"group", "task"}
        if wanted <= present:
            return
        # A ParquetFile reads this one file; read_table would also look for a dataset around it.
        with pq.ParquetFile(path) as file:
            table = file.read()
        prompts = table["prompt"].to_pylist()
        columns: dict[str, pa.Array] = {}
        if "group" not in present and (groups := self._groups(prompts, args, path)) is not None:
            columns["group"] = pa.array(groups, pa.int64())
        if self.task_of is not None and "task" not in present:
            columns["task"] = pa.array([self.task_of(prompt) for prompt in prompts], pa.string())
        if columns:
            _replace(path, table, columns)

    def _groups(self, prompts: list[Any], args: Arguments, path: Path) -> list[int] | None:
        """Group of each row. None, with a warning, where the rows are not whole groups."""
        size = args.num_generations
        evaluated = args.num_generations_eval or size
        # After an evaluation, TRL's table can hold rows of training and of evaluation, and does not tell them apart.
        if self._mixed and evaluated != size:
            reason = f"it may mix groups of num_generations={size} and of num_generations_eval={evaluated}"
        elif len(prompts) % size:
            reason = f"its {len(prompts)} rows are not a multiple of num_generations={size}"
        elif any(prompts[row] != prompts[row - row % size] for row in range(len(prompts))):
            reason = f"its rows are not blocks of num_generations={size} equal prompts"
        else:
            return [row // size for row in range(len(prompts))]
        if path not in self._refused:
            self._refused.add(path)
            warnings.warn(f"{path} gets no column 'group': {reason}.", stacklevel=2)
        return None


def _replace(path: Path, table: pa.Table, columns: dict[str, pa.Array]) -> None:
    """Replace the file by the table with further columns. A reader sees the old file or the new file, never a part."""
    for name, values in columns.items():
        table = table.append_column(name, values)
    # Not named *.parquet: TRL uploads every file of that name in the folder.
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(table, unfinished)
    os.replace(unfinished, path)
