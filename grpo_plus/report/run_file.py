"""grpo_plus_run.json: the settings that a run records beside its checkpoints, as plain JSON and without secrets.

The trainer writes the file, a replay reads it, and the model card quotes it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_plus.report.files import read_json, write_files
from grpo_plus.report.secrets import masked

RUN_FILE = "grpo_plus_run.json"
LARGEST_GROUP = 2**16  # what a received file may claim


@dataclass(frozen=True)
class RunRecord:
    """What a run was told, and what ran it.

    Attributes:
        trainer: the class, by its dotted path; a subclass may compute advantages of its own.
        settings: the fields of the configuration by name.
        rewards: the weight of each reward function, by its name.
        versions: of the packages.
    """

    trainer: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_generations(self) -> int | None:
        """G of the training; None where the file does not say."""
        size = self.settings.get("num_generations")
        return size if isinstance(size, int) and not isinstance(size, bool) and 2 <= size <= LARGEST_GROUP else None


def write_run(folder: str | Path, record: RunRecord) -> Path:
    """Write the record into `folder`, whole or not at all."""
    text = json.dumps(masked(vars(record)), indent=1, default=str) + "\n"
    return write_files(folder, {RUN_FILE: lambda path: path.write_text(text, encoding="utf-8")})[0]


def read_run(folder: str | Path) -> RunRecord | None:
    """The record of the run that wrote into `folder`; None where there is none, or something else under its name."""
    found = read_json(Path(folder, RUN_FILE))
    if not isinstance(found, dict):
        return None
    settings, rewards, versions = (_table(found.get(name)) for name in ("settings", "rewards", "versions"))
    weights = {
        name: float(weight)
        for name, weight in rewards.items()
        if isinstance(weight, int | float) and math.isfinite(weight)
    }
    return RunRecord(str(found.get("trainer", "")), settings, weights, versions)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def numbered(output_dir: Path) -> dict[int, Path]:
    """The folders `checkpoint-<step>` in a folder, by step, the newest first."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*")}
    steps = {int(name[1]): path for path, name in found.items() if name}
    return dict(sorted(steps.items(), reverse=True))
