"""Which settings fit the run: what only the trainer knows, the reward functions' names and the dataset's columns."""

from collections.abc import Sequence
from typing import Any

from grpo_plus.advantages import ESTIMATORS, check_keywords, check_modifiers
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.losses import LOSSES, TRL_LOSSES
from grpo_plus.registry import suggestion


def check_estimator(
    config: GRPOPlusConfig, names: Sequence[str], weights: Sequence[float], *, num_generations: int
) -> None:
    """Refuse an estimator or a modifier that names no reward function of the run, or one of two.

    Args:
        names: the run's reward functions.
        weights: their weights.
    """
    if config.advantage_estimator is None:
        return
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(
            f"Two reward functions are called {twice[0]!r}, so neither modifiers nor the log can tell them apart. Give "
            "one of them another __name__."
        )
    # Both are tables after the configuration's own checks.
    keywords: Any = config.advantage_kwargs
    modifiers: Any = config.advantage_modifiers
    try:
        check_keywords(
            ESTIMATORS[config.advantage_estimator],
            keywords,
            num_generations=num_generations,
            names=names,
            weights=weights,
        )
    except ValueError as error:
        raise ValueError(f"advantage_kwargs={keywords} does not fit this run: {error}") from error
    try:
        check_modifiers(modifiers, names)
    except ValueError as error:
        raise ValueError(f"advantage_modifiers={modifiers} does not fit this run: {error}") from error


def check_task_column(column: str | None, dataset: Any) -> None:
    """Refuse a `task_column` that the dataset lacks; a stream may not know its columns before it is read."""
    columns = getattr(dataset, "column_names", None)
    if column is not None and columns is not None and column not in columns:
        raise ValueError(f"task_column={column!r} is no column of the dataset.{suggestion(column, columns)}")


def check_plain_loss(loss_type: str) -> None:
    """Refuse, under a plain GRPOConfig, a loss that only a GRPOPlusConfig can describe."""
    if loss_type not in TRL_LOSSES:
        loss = LOSSES[loss_type]  # raises with the nearest name for a misspelt one
        raise ValueError(
            f"loss_type={loss.name!r} is none of TRL's and takes its settings from a GRPOPlusConfig, but `args` is a "
            "GRPOConfig. Write args=GRPOPlusConfig(...)."
        )
