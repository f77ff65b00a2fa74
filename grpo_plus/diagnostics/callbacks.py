"""Callbacks for any GRPO trainer, TRL's or ours: one reads the log for rewards that stop teaching, one adds the groups
to the tables of completions. They read logs, arguments and files, and nothing inside a trainer.
"""

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus.advantages import ESTIMATORS

LENGTH, ENTROPY = "completions/mean_length", "entropy"
DEAD_GROUPS = "advantages/dead_groups"
ZERO_SPREAD, REWARD_SHARE = "advantages/zero_spread/", "advantages/reward_share/"
# TRL writes float32 statistics: equal rewards can show a std of about 1e-7 of their value.
ROUNDING = 1e-6

Logs = dict[str, Any]
Finding = tuple[str, str | None]


class RewardHealthCallback(TrainerCallback):
    """Warns, once per cause and with what to try, when the log says that the rewards stopped teaching what they should.

    A cause must show in `patience` training logs in a row. The `advantages/` figures are those of GRPOPlusTrainer;
    without them the callback uses what TRL logs. Evaluation logs are ignored. A resumed run continues from the
    checkpoint's log.

    Args:
        patience: logs in a row; also how many first logs are averaged into what length and entropy are compared with.
        dead_groups: share of groups whose advantages are all 0, from which most of the batch is idle.
        reward_share: share of the centred reward above which one function drives the update alone.
        length_ratio: factor by which the mean length may grow or shrink.
        length_correlation: largest harmless |correlation| of advantage and length.
        entropy_ratio: share of its mean over the first `patience` logs below which the entropy counts as collapsed.
    """

    def __init__(
        self,
        *,
        patience: int = 5,
        dead_groups: float = 0.95,
        reward_share: float = 0.95,
        length_ratio: float = 2.0,
        length_correlation: float = 0.8,
        entropy_ratio: float = 0.1,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} is a number of logs in a row. Use 1 to warn at the first sign.")
        if length_ratio <= 1:
            raise ValueError(f"length_ratio={length_ratio} is a factor of growth or shrinkage. Use more than 1.")
        shares = {
            "dead_groups": dead_groups,
            "reward_share": reward_share,
            "length_correlation": length_correlation,
            "entropy_ratio": entropy_ratio,
        }
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"{name}={share} is a share. Use a value above 0 and at most 1.")
        self.patience = patience
        self.dead_groups = dead_groups
        self.reward_share = reward_share
        self.length_ratio = length_ratio
        self.length_correlation = length_correlation
        self.entropy_ratio = entropy_ratio
        self._warned: set[str] = set()
        self._forget()

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Start anew, or from the log of the checkpoint that is resumed."""
        self._forget()
        for entry in state.log_history:
            self._read(entry, args)

    def on_log(self, args: Arguments, state: State, control: Control, logs: Logs | None = None, **kwargs: Any) -> None:
        """Warn of what has shown for `patience` logs."""
        for cause, message in self._read(logs or {}, args):
            if message and self._streak[cause] >= self.patience and cause not in self._warned:
                self._warned.add(cause)
                if state.is_world_process_zero:
                    warnings.warn(f"Step {state.global_step}, {self.patience} logs in a row: {message}", stacklevel=2)

    def _forget(self) -> None:
        self._streak: defaultdict[str, int] = defaultdict(int)
        self._first: defaultdict[str, list[float]] = defaultdict(list)

    def _read(self, logs: Logs, args: Arguments) -> list[Finding]:
        """Count one log; a cause that this log says nothing about keeps its streak."""
        # TRL logs None where no completion of the window had a value; some integrations turn that into NaN.
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)}
        for key in (LENGTH, ENTROPY):
            if key in numbers and len(self._first[key]) < self.patience:
                self._first[key].append(numbers[key])
        findings = [*self._dead(numbers), *self._saturated(numbers), *self._dominant(numbers, args)]
        findings += [*self._drifted(numbers), *self._collapsed(numbers)]
        for cause, message in findings:
            self._streak[cause] = self._streak[cause] + 1 if message else 0
        return findings

    def _dead(self, logs: Logs) -> Iterator[Finding]:
        # Under scale_rewards="batch" TRL's figure is a flag of the whole batch; ours stays a share of groups.
        share = logs.get(DEAD_GROUPS, logs.get("frac_reward_zero_std"))
        if share is None:
            return
        message = (
            f"in {share:.0%} of the groups no completion is better or worse than another, and these teach nothing. "
            "Try prompts of another difficulty, a larger num_generations, a higher temperature, or a reward with "
            "partial credit."
        )
        yield "dead_groups", message if share >= self.dead_groups else None

    def _saturated(self, logs: Logs) -> Iterator[Finding]:
        for key, std in logs.items():
            if not (key.startswith("rewards/") and key.endswith("/std")):
                continue
            name = key.removeprefix("rewards/").removesuffix("/std")
            mean = logs.get(f"rewards/{name}/mean", 0.0)
            # Where rewards of steps decide, what the function returned may be constant; our figure knows.
            constant = logs.get(ZERO_SPREAD + name, float(std <= ROUNDING * abs(mean))) >= 1
            message = (
                f"reward {name!r} (mean {mean:.4g}) does not tell the completions of any group apart, and so teaches "
                "nothing. If it is at its best, drop it or make it harder; if at its worst, check its parsing on the "
                "logged completions (log_completions=True)."
            )
            yield f"saturated/{name}", message if constant else None

    def _dominant(self, logs: Logs, args: Arguments) -> Iterator[Finding]:
        normalize = ', or an estimator that normalizes each reward by itself: advantage_estimator="gdpo"'
        advice = "a smaller weight for it in reward_weights" + ("" if _normalizes_each(args) else normalize)
        for key, share in logs.items():
            if key.startswith(REWARD_SHARE):
                name = key.removeprefix(REWARD_SHARE)
                message = (
                    f"reward {name!r} makes up {share:.0%} of the differences between completions; the other rewards "
                    f"hardly count. Try {advice}."
                )
                yield f"dominant/{name}", message if share > self.reward_share else None

    def _drifted(self, logs: Logs) -> Iterator[Finding]:
        if LENGTH in logs:
            length, first = logs[LENGTH], _mean(self._first[LENGTH])
            cut = logs.get("completions/clipped_ratio")
            message = (
                f"completions have {length:.0f} tokens on average and had {first:.0f} at first"
                f"{'' if cut is None else f', {cut:.0%} of them cut off at max_completion_length'}. Check that no "
                'reward pays for length as such; try loss_type="dr_grpo" or "dapo", or a penalty for overlong ones.'
            )
            drifted = length > first * self.length_ratio or length * self.length_ratio < first
            yield "length", message if drifted else None
        if "advantages/length_correlation" in logs:
            correlation = logs["advantages/length_correlation"]
            message = (
                f"the advantages follow the length of the completions (correlation {correlation:+.2f}): the policy is "
                f"taught to write {'longer' if correlation > 0 else 'shorter'}. Check whether a reward measures length "
                "instead of quality."
            )
            yield "length_correlation", message if abs(correlation) > self.length_correlation else None

    def _collapsed(self, logs: Logs) -> Iterator[Finding]:
        if ENTROPY in logs:
            entropy, first = logs[ENTROPY], _mean(self._first[ENTROPY])
            message = (
                f"the entropy fell to {entropy:.3g} from {first:.3g}: completions of one prompt become copies of each "
                "other. Try a lower learning_rate, a larger epsilon_high (0.28), a KL term (beta > 0), or a higher "
                "temperature."
            )
            yield "entropy", message if entropy < self.entropy_ratio * first else None


class AdvantageTableCallback(TrainerCallback):
    """Adds `group`, the index of the row's prompt in its batch, to the tables of completions that TRL writes.

    With log_completions=True TRL writes a parquet file per log under output_dir/completions; with the group one can
    compare each completion with those it competed against. A column that a file already has is left alone, such as the
    `task` that GRPOPlusTrainer writes where task_column is set.

    Args:
        task_of: gives the task of a prompt as the table holds it (text, or a list of messages) for a column `task`.
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
        """Notice whether new completions have taken the place of those of an evaluation."""
        if "loss" not in (logs or {}):
            return  # not a log of training steps
        if "reward" in (logs or {}) and not self._unlogged:
            self._mixed = False
        self._unlogged = False
        self._logged_at = state.global_step

    # TRL writes a step's table right after on_log, so each of these comes next and finds it complete.
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
        self._unlogged = False  # whether the next log may tell of completions from before that evaluation

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
        """Each row's group, or None with a warning where the rows are not whole groups."""
        size = args.num_generations
        evaluated = args.num_generations_eval or size
        # After an evaluation TRL's table can hold rows of both kinds, and does not say which is which.
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


def _normalizes_each(args: Arguments) -> bool:
    """Whether the run divides each reward function by its own spread already."""
    name = getattr(args, "advantage_estimator", None)
    if name is None:
        return getattr(args, "multi_objective_aggregation", None) == "normalize_then_sum"
    return ESTIMATORS[name].normalizes_each


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _replace(path: Path, table: pa.Table, columns: dict[str, pa.Array]) -> None:
    """Write the table with further columns in place of the file; a reader sees the old file or the new one."""
    for name, values in columns.items():
        table = table.append_column(name, values)
    # Not named *.parquet: TRL uploads every file of that name in the folder.
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(table, unfinished)
    os.replace(unfinished, path)
