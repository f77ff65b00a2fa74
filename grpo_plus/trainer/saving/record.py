"""What a run says about itself: its settings in plain JSON beside the checkpoints, and a section of its model card."""

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_plus.config.plain import OFF
from grpo_plus.report.run_file import RunRecord, write_run
from grpo_plus.report.secrets import masked
from grpo_plus.version import versions

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam

logger = logging.getLogger(__name__)

PACKAGES = ("accelerate", "datasets", "peft", "bitsandbytes")
CARD, HEADING, BEFORE = "README.md", "## Training settings", "### Framework versions"
# Settings of TRL's that say what was trained, whatever their value.
SHOWN = (
    "loss_type",
    "scale_rewards",
    "multi_objective_aggregation",
    "beta",
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "num_generations",
    "max_completion_length",
    "temperature",
    "seed",
)


def record_of(trainer: "TRLSeam") -> RunRecord:
    """The record of a trainer's run."""
    kind = type(trainer)
    return RunRecord(
        trainer=f"{kind.__module__}.{kind.__qualname__}",
        settings=masked({entry.name: _plain(getattr(trainer.args, entry.name)) for entry in fields(trainer.args)}),
        rewards=dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)),
        versions=_versions(),
    )


def write_record(trainer: "TRLSeam") -> None:
    """Write the record of the run that begins into its output_dir; a folder that cannot be written to is named once."""
    if not trainer.is_world_process_zero():
        return
    try:
        write_run(trainer.args.output_dir, record_of(trainer))
    except OSError as error:
        logger.warning("The settings of the run are not recorded: %s", error)


def add_to_card(folder: str | Path, record: RunRecord) -> None:
    """Add the settings to the model card that TRL has written into `folder`."""
    path = Path(folder, CARD)
    text = path.read_text(encoding="utf-8")
    head, mark, tail = text.partition(BEFORE)
    path.write_text(f"{head.rstrip()}\n\n{section(record)}\n\n{mark}{tail}", encoding="utf-8")


def section(record: RunRecord) -> str:
    """The settings as Markdown: estimator, loss, rewards, every field that is not TRL's default, versions."""
    settings = record.settings
    estimator = settings.get("advantage_estimator") or "TRL's own"
    rows: list[tuple[str, Any]] = [("advantages", estimator), ("rewards", _listed(record.rewards))]
    rows += [(name, settings[name]) for name in SHOWN if name in settings]
    rows += [(name, settings[name]) for name, off in OFF.items() if settings.get(name, off) not in (off, None)]
    rows += list(record.versions.items())
    lines = [f"| {name} | `{_cell(value)}` |" for name, value in dict(rows).items()]
    return "\n".join([HEADING, "", "| setting | value |", "| --- | --- |", *lines])


def _listed(rewards: Mapping[str, float]) -> str:
    return ", ".join(f"{name} (weight {weight:g})" for name, weight in rewards.items())


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no infinity
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _versions() -> dict[str, str]:
    found = versions()
    for package in PACKAGES:
        try:
            found |= {package: versions(package)[package]}
        except PackageNotFoundError:
            continue
    return found
