"""Reward functions of the evaluations alone: TRL prepares them with the training's, and they take turns.

Whoever judges has a column in TRL's table of completions. The evaluations therefore have a table of their own, which
is not written: TRL would write it in place of the training's table of the same step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from trl import GRPOTrainer

from grpo_plus.trainer.names import empty_table, set_table, table_of


@dataclass(frozen=True)
class Judges:
    """Who judges completions, as TRL keeps it, and the table that their rewards go to.

    Attributes:
        functions: reward functions and reward models.
        names: of the functions.
        processing_classes: of the reward models; None for a function.
        weights: (K,) of the rewards.
        table: TRL's columns of completions.
        writes: whether TRL shows and writes the table.
    """

    functions: list[Any]
    names: list[str]
    processing_classes: list[Any]
    weights: Any
    table: dict[str, Any]
    writes: bool

    @classmethod
    def of(cls, trainer: GRPOTrainer) -> "Judges":
        """The judges that a trainer asks at the moment."""
        return cls(
            trainer.reward_funcs,
            trainer.reward_func_names,
            trainer.reward_processing_classes,
            trainer.reward_weights,
            table_of(trainer),
            trainer.log_completions,
        )

    def take_over(self, trainer: GRPOTrainer) -> None:
        """Let the trainer ask these judges."""
        trainer.reward_funcs = self.functions
        trainer.reward_func_names = self.names
        trainer.reward_processing_classes = self.processing_classes
        trainer.reward_weights = self.weights
        trainer.log_completions = self.writes
        set_table(trainer, self.table)

    def at(self, columns: list[int]) -> "Judges":
        """Some of the judges, by their columns."""
        functions, names, classes = (
            [column_of[column] for column in columns]
            for column_of in (self.functions, self.names, self.processing_classes)
        )
        return replace(
            self, functions=functions, names=names, processing_classes=classes, weights=self.weights[columns]
        )


class EvalRewards:
    """Who judges the trainings and the evaluations of one trainer.

    Args:
        trainer: whose reward functions are those of `both`.
        given: number of reward functions of the training that the user has given.
        added: number of the evaluation's behind them. 0: the training's judge the evaluations too.
    """

    def __init__(self, trainer: GRPOTrainer, *, given: int, added: int) -> None:
        self._trainer = trainer
        self.are_own = added > 0
        self._training = self._evaluation = Judges.of(trainer)
        if not self.are_own:
            return
        everyone = list(range(len(self._training.names)))
        theirs = everyone[given : given + added]
        # TRL has appended what environments judge themselves.
        ours = [column for column in everyone if column not in theirs]
        if not ours:
            raise ValueError(
                "eval_reward_funcs judge evaluations only. Set reward_funcs too, which the training needs."
            )
        self._evaluation = replace(self._training.at(theirs), table=empty_table(trainer), writes=False)
        self._training = self._training.at(ours)
        self._training.take_over(trainer)

    @property
    def names(self) -> list[str]:
        """Names of the functions that judge an evaluation."""
        return self._evaluation.names

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Inside, the evaluation's functions judge. Afterwards whoever judged before does, whatever was raised."""
        with self._asked(self._evaluation):
            yield

    @contextmanager
    def left(self) -> Iterator[None]:
        """Inside, all is as in training: what a signal within an evaluation has saved must be the training's."""
        with self._asked(self._training):
            yield

    @contextmanager
    def _asked(self, judges: Judges) -> Iterator[None]:
        if not self.are_own:
            yield
            return
        before = Judges.of(self._trainer)
        judges.take_over(self._trainer)
        try:
            yield
        finally:
            before.take_over(self._trainer)


def listed(functions: Any) -> list[Any]:
    """One reward function, several or none, as TRL takes them."""
    return [] if functions is None else list(functions) if isinstance(functions, (list, tuple)) else [functions]


def both(given: Mapping[str, Any], added: list[Any]) -> dict[str, Any]:
    """The trainer's arguments, with the evaluation's reward functions behind the training's."""
    functions, classes = listed(given.get("reward_funcs")), given.get("reward_processing_classes")
    joined = {**given, "reward_funcs": [*functions, *added]}
    if classes is not None:
        joined["reward_processing_classes"] = [*listed(classes), *[None] * len(added)]
    return joined


@contextmanager
def weighing(args: Any, added: int) -> Iterator[None]:
    """Inside, the configuration has weights for the evaluation's functions, too: 1 for each."""
    weights = getattr(args, "reward_weights", None)
    if weights is None:
        yield
        return
    args.reward_weights = [*weights, *[1.0] * added]
    try:
        yield
    finally:
        args.reward_weights = weights
