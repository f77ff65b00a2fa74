"""What a run says about its rollouts: a bar while a long rollout goes on, and figures in the log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

from tqdm.auto import tqdm
from trl import GRPOTrainer

from grpo_plus.rollout import Progress, Statistics, Watch

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam

DELAY = 5.0  # seconds that a rollout takes before it gets a bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}"


class RolloutLog:
    """Follows the rollouts of one run, as far as the grouped loop decodes them."""

    def __init__(self, trainer: "TRLSeam") -> None:
        self._trainer = trainer

    @contextmanager
    def followed(self, rows: int, other: Watch) -> Iterator[None]:
        """Inside, the `generate` that TRL calls for a number of rows decodes with the loop of the run.

        Args:
            other: also watches.
        """
        trainer, rollouts = self._trainer, self._trainer.speed.rollouts
        if rollouts is None:
            yield
            return
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        with self._shown(rows, rollouts.statistics, other) as watch, rollouts.decoding(model, watch):
            yield
        trainer._step_figures.rolled_out(Statistics.joined(rollouts.statistics))

    @contextmanager
    def _shown(self, rows: int, parts: list[Statistics], other: Watch) -> Iterator[Watch]:
        """A bar that moves whenever it hears of a token.

        Args:
            rows: of all parts of the rollout.
            parts: that are finished, to which the rollout adds.
        """
        bar = RolloutBar(rows, delay=DELAY, silent=_is_silent(self._trainer))
        guarded = self._trainer._figures.guarded

        def watch(so_far: Progress) -> None:
            other(so_far)
            if bar.is_due:
                done = so_far.statistics
                with guarded("The bar of a rollout"):
                    bar.show(Statistics.joined([*parts, done]), sum(part.rows for part in parts) + done.finished)

        try:
            yield watch
        finally:
            with guarded("The bar of a rollout"):
                bar.close()


class RolloutBar:
    """A bar under the bars that are shown already. There is none before a rollout has taken some seconds.

    Args:
        rows: of the rollout.
        delay: seconds.
        silent: whether there never is a bar.
    """

    def __init__(self, rows: int, *, delay: float, silent: bool) -> None:
        self._rows = rows
        self._silent = silent
        self._began = perf_counter()
        self._delay = delay
        self._bar: tqdm | None = None

    @property
    def is_due(self) -> bool:
        """Whether the rollout has taken long enough."""
        return not self._silent and perf_counter() - self._began >= self._delay

    def show(self, done: Statistics, finished: int) -> None:
        """Move the bar to the rows that are finished."""
        elapsed = tqdm.format_interval(perf_counter() - self._began)
        words = f"{done.new_tokens:,} tokens, {done.new_tokens / done.seconds:,.0f} tokens/s, {elapsed}"
        if self._bar is None:
            self._bar = self._drawn(finished, words)
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(finished - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _drawn(self, finished: int, words: str) -> tqdm:
        # Rows may end long after one another: the time decides when the bar is drawn anew, not how far it has moved.
        return tqdm(
            desc="rollout",
            initial=finished,
            total=self._rows,
            postfix=words,
            bar_format=BAR,
            miniters=0,
            mininterval=0.5,
            leave=False,
            dynamic_ncols=True,
        )


def _is_silent(trainer: GRPOTrainer) -> bool:
    """Whether the run shows no bars on this process, or logs errors only."""
    args = trainer.args
    return args.disable_tqdm or not trainer.is_world_process_zero() or args.get_process_log_level() > logging.WARNING
