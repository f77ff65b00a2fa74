"""Which settings fit the run: what only the trainer knows, of the reward functions, the dataset and the model."""

from collections.abc import Sequence
from typing import Any

from datasets import IterableDataset
from torch.utils import data
from trl import GRPOTrainer

from grpo_plus.advantages import ESTIMATORS, check_keywords, check_modifiers
from grpo_plus.config.data import first_row
from grpo_plus.config.fields import GRPOPlusConfig
from grpo_plus.losses import LOSSES, TRL_LOSSES
from grpo_plus.registry import suggestion


def check_estimator(
    config: GRPOPlusConfig, names: Sequence[str], weights: Sequence[float], *, num_generations: int
) -> None:
    """Refuse two reward functions of one name, and an estimator or a modifier that names none of the run's.

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
    """Refuse a `task_column` that the dataset lacks; a stream may not know its columns before it is read.

    With a `rollout_func` nothing is checked here, since the function may fill the column.
    """
    columns = getattr(dataset, "column_names", None)
    if column is not None and columns is not None and column not in columns:
        raise ValueError(f"task_column={column!r} is no column of the dataset.{suggestion(column, columns)}")


def check_refillable(max_refills: int, refill_buffer: int, dataset: Any) -> None:
    """Refuse dynamic sampling where rows hold more than text, or where those of a refill cannot be drawn by index."""
    if max_refills and isinstance(dataset, IterableDataset | data.IterableDataset):
        raise ValueError(
            f"max_refills={max_refills} draws rows of train_dataset by index, but a {type(dataset).__name__} has none. "
            "Load it without streaming, or set max_refills=0."
        )
    name, value = ("max_refills", max_refills) if max_refills else ("refill_buffer", refill_buffer)
    row = first_row(dataset) if value else None
    if row is None:
        return
    if images := sorted({"image", "images"} & set(row)):
        raise ValueError(
            f"{name}={value} moves rows of text only, but train_dataset has the column {images[0]!r}. Set {name}=0."
        )
    if pictured(row.get("prompt")):
        raise ValueError(
            f"{name}={value} moves rows of text only, but the messages of train_dataset hold images. Set {name}=0."
        )


def check_demonstrated_run(column: str, trainer: GRPOTrainer) -> None:
    """Refuse a dataset without the column or with images, and completions that others than the policy write to."""
    dataset = trainer.train_dataset
    columns, row = getattr(dataset, "column_names", None), first_row(dataset) or {}
    if columns is not None and column not in columns:
        raise ValueError(f"demonstration_column={column!r} is no column of train_dataset.{suggestion(column, columns)}")
    others = {
        "rollout_func": trainer.rollout_func is not None,
        "tools": bool(trainer.tools) or trainer.environment_factories is not None,
        "images": bool({"image", "images"} & {*(columns or ()), *row}) or pictured(row.get("prompt")),
    }
    if found := [name for name, there in others.items() if there]:
        raise ValueError(
            f"demonstration_column={column!r} is for completions of one turn of text, and the run has {found[0]}. "
            "Leave demonstration_column unset."
        )


def pictured(prompt: Any) -> bool:
    """Whether the content of a message holds anything but text."""
    contents = [message.get("content") for message in prompt] if isinstance(prompt, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type", "text") != "text" for part in parts)


def check_router_loss(loss_type: str, coefficient: float) -> None:
    """Refuse, for a model with a router's auxiliary loss, one of our losses."""
    if loss_type not in TRL_LOSSES:
        raise ValueError(
            f"loss_type={loss_type!r} does not add the router's auxiliary loss of a mixture-of-experts model, but "
            f"router_aux_loss_coef={coefficient}, from the arguments or the model's config. Set "
            "router_aux_loss_coef=0.0 in the arguments to train without it, or take one of TRL's losses."
        )


def check_plain_loss(loss_type: str) -> None:
    """Refuse, under a plain GRPOConfig, a loss that only a GRPOPlusConfig can describe."""
    if loss_type not in TRL_LOSSES:
        loss = LOSSES[loss_type]  # raises with the nearest name for a misspelt one
        raise ValueError(
            f"loss_type={loss.name!r} is none of TRL's and takes its settings from a GRPOPlusConfig, but `args` is a "
            "GRPOConfig. Write args=GRPOPlusConfig(...)."
        )
