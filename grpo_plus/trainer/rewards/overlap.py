"""Reward functions that do not wait for TRL's call: they judge beside what the training does meanwhile.

TRL calls the reward functions when everything else is done, one after the other. Here a call begins as soon as its
completions are final: while other groups are still being written, or beside the passes for log-probabilities. TRL's own
call then takes the rewards that are there, and waits for the others. It is compared with the call that has begun: where
they differ, the function is called anew.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from torch import nn

from grpo_plus.config.overlap import BATCH, GROUPS
from grpo_plus.rollout import Progress
from grpo_plus.trainer.names import (
    decoded_completions,
    generations_of,
    reward_columns,
    same_reward_columns,
    until_end,
    why_not_decoded,
)
from grpo_plus.trainer.rewards.background import Running, Surroundings
from grpo_plus.trainer.rewards.logs import KeptLogs, Log, with_harmless_logs
from grpo_plus.trainer.rewards.values import awaited, called, is_async

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam

logger = logging.getLogger("grpo_plus")

WORDS = {
    BATCH: "in one call, beside the passes for log-probabilities",
    GROUPS: "in one call for each prompt, beside the generation of other prompts",
}

Written = tuple[list[list[int]], Any]  # token ids of completions, and what else TRL's generation gives


@dataclass(frozen=True)
class Call:
    """A call of one reward function.

    Attributes:
        columns: its arguments, without those for the log.
        logs: what it logs.
    """

    columns: dict[str, Any]
    logs: KeptLogs
    running: Running


class Overlap:
    """Calls of reward functions that begin before TRL asks for them.

    Args:
        chosen: how the functions are called, by name, or all of them alike. None: as TRL does.
    """

    def __init__(self, trainer: "TRLSeam", chosen: Mapping[str, str] | str | None) -> None:
        self._trainer = trainer
        self._chosen = chosen
        self._told: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._around: Surroundings | None = None
        self._inputs: list[dict[str, Any]] = []
        self._prompts: list = []
        self._groups: list[range] = []  # this process's rows of each prompt
        self._early = False  # whether a row is final as soon as it is written
        self._first = 0  # row of the part that is being generated
        self._ids: dict[int, list[int]] = {}  # of the rows that are final
        self._calls: dict[tuple[int, range], Call] = {}  # by the number of the function, and the rows

    @property
    def names(self) -> list[str]:
        """The reward functions that can be called so. A reward model computes, and keeps its place."""
        functions = zip(self._trainer.reward_funcs, self._trainer.reward_func_names, strict=True)
        return [name for function, name in functions if not isinstance(function, nn.Module)]

    @contextmanager
    def batch(self, inputs: list[dict[str, Any]]) -> Iterator[None]:
        """Inside, one generation batch is made of rows of the dataset, and judged."""
        self._inputs, self._around = inputs, Surroundings.here()
        try:
            yield
        finally:
            self._forget()

    def generates(self, prompts: list) -> None:
        """Note that the batch's completions are about to be generated."""
        self._prompts, self._groups = prompts, self._rows_by_prompt(len(prompts))
        for mode, words in WORDS.items():
            if names := [self._trainer.reward_func_names[number] for number in self._numbers(mode)]:
                self._say(f"rewards: {', '.join(names)} {words}")
        if not self._numbers(GROUPS):
            return
        reason = why_not_decoded(self._trainer, prompts)
        self._early = reason is None and len(prompts) == len(self._inputs)
        if reason is not None:
            self._say(f"overlap_rewards: groups are judged when all are written. {reason}.")

    @contextmanager
    def part(self, first: int) -> Iterator[Callable[[Written], Written]]:
        """Inside, completions are generated from the row `first` on. The function that it gives is told of them."""

        def written(completed: Written) -> Written:
            if first + len(completed[0]) < len(self._prompts):  # after the last part, all are judged
                self._take(dict(enumerate(completed[0], first)))
            return completed

        self._first = first
        yield written

    def watch(self, so_far: Progress) -> None:
        """Let groups be judged whose rows have all ended, while others are still being written."""
        if not self._early:
            return
        part = range(self._first, self._first + len(so_far.unfinished))
        for group in self._groups:
            is_here = group.start in part and group[-1] in part and group.start not in self._ids
            if not is_here or any(so_far.unfinished[row - self._first] for row in group):
                continue
            ids = so_far.completion_ids(slice(group.start - self._first, group.stop - self._first))
            ended = [until_end(self._trainer, row) for row in ids]
            # A row that something else has ended is as long as the longest one will be.
            if all(ended):
                self._take(dict(zip(group, ended, strict=True)))

    def _take(self, ids: dict[int, list[int]]) -> None:
        """Let functions judge the groups that some final rows complete."""
        if not self._early:
            return
        self._ids |= ids
        for group in self._groups:
            if self._ids.keys() >= set(group) and not ids.keys().isdisjoint(group):
                own = [self._ids[row] for row in group]
                prompts = self._prompts[group.start : group.stop]
                completions = decoded_completions(self._trainer, prompts, own)
                columns = reward_columns(self._trainer, group, self._inputs, prompts, completions, own)
                for number in self._numbers(GROUPS):
                    self._call(number, group, columns)

    def generated(self, output: tuple) -> None:
        """Let all completions be judged, which are final.

        Args:
            output: of TRL's `_generate`.
        """
        ids, completions, added = output[1], output[3], output[5]
        if self._inputs and not added:  # else TRL adds columns to the rows first
            self.begin(self._inputs, self._prompts, completions, ids)

    def begin(self, inputs: list[dict[str, Any]], prompts: list, completions: list, ids: list[list[int]]) -> None:
        """Begin the calls that TRL is about to make, except those that have begun."""
        for mode, units in ((BATCH, [range(len(prompts))]), (GROUPS, self._rows_by_prompt(len(prompts)))):
            for number, rows in product(self._numbers(mode), units):
                part = slice(rows.start, rows.stop)
                columns = reward_columns(self._trainer, rows, inputs, prompts[part], completions[part], ids[part])
                self._call(number, rows, columns)

    def has(self, number: int) -> bool:
        """Whether calls of a reward function have begun."""
        return any(known == number for known, _ in self._calls)

    def rewards(self, number: int, timeout: float | None, log_metric: Log, log_extra: Log) -> list[Any]:
        """The rewards of all rows. What the function has logged goes to TRL, in the order of the rows.

        Args:
            number: of the reward function.
            timeout: seconds that a call may take. None: no bound.
        """
        begun = sorted((rows for known, rows in self._calls if known == number), key=lambda rows: rows.start)
        calls = [self._calls.pop((number, rows)) for rows in begun]
        rewards = []
        for call in calls:
            rewards += call.running.result(timeout)
            call.logs.hand_over(log_metric, log_extra)
        return rewards

    def _call(self, number: int, rows: range, columns: dict[str, Any]) -> None:
        known = self._calls.get((number, rows))
        if known is not None and same_reward_columns(known.columns, columns):
            return
        function, name = self._trainer.reward_funcs[number], self._trainer.reward_func_names[number]
        if known is not None:
            self._say(
                f"overlap_rewards: {name!r} judges {len(rows)} completions anew, since they or their columns have "
                "changed after they were generated."
            )
        logs = KeptLogs()
        given = {key: list(value) if isinstance(value, list) else value for key, value in columns.items()}
        given |= {"log_metric": logs.metric, "log_extra": logs.extra}
        given = with_harmless_logs(self._trainer._figures, name, given)
        around = self._around or Surroundings.here()
        if is_async(function):
            start = partial(awaited, name, function, given, len(rows))
            running = Running.on_loop(name, start, self._trainer.async_loop, around)
        else:
            running = Running.in_thread(name, partial(called, name, function, given, len(rows)), around)
        self._calls[number, rows] = Call(columns, logs, running)

    def _numbers(self, mode: str) -> list[int]:
        """The reward functions that are called in a way."""
        chosen = self._chosen if isinstance(self._chosen, Mapping) else dict.fromkeys(self.names, self._chosen)
        return [number for number, name in enumerate(self._trainer.reward_func_names) if chosen.get(name) == mode]

    def _rows_by_prompt(self, rows: int) -> list[range]:
        """This process's rows of each prompt. The first and last prompt may have more at another process."""
        before, size = self._trainer.accelerator.process_index * rows, generations_of(self._trainer)
        cuts = [0, *(row for row in range(1, rows) if (before + row) % size == 0), rows]
        return [range(*cut) for cut in pairwise(cuts)]

    def _say(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            logger.info(line)
