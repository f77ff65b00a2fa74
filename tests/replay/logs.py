"""Small logs of completions, as TRL writes them: pandas tables, one file per step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from grpo_plus.replay import Rollouts
from tests.report.hostile import HOSTILE


def table(rewards: Mapping[str, Sequence], *, step: int = 1, size: int = 2, **columns: Any) -> dict[str, list]:
    """A table with groups of `size` equal prompts; further columns, and other prompts, by keyword."""
    rows = len(next(iter(rewards.values())))
    defaults = {
        "step": [step] * rows,
        "prompt": [f"prompt {row // size}" for row in range(rows)],
        "completion": [f"step {step}, completion {row}" for row in range(rows)],
    }
    return {**defaults, **{name: list(values) for name, values in rewards.items()}, **columns}


def write(run_dir: Path, step: int, columns: Mapping[str, Sequence]) -> Path:
    folder = Path(run_dir, "completions")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    pd.DataFrame(columns).to_parquet(path)
    return path


def write_rewards(run_dir: Path, step: int, rewards: Mapping[str, Sequence], **columns: Any) -> Path:
    return write(run_dir, step, table(rewards, step=step, **columns))


def hostile_log(run_dir):
    """Markup in completions, prompts, tasks and the reward's own name."""
    rewards = {"<i>$r$": [1.0, 0.0, 0.5, 0.0], "b": [0.0, 0.0, 0.25, 1.0]}
    texts = {"prompt": [HOSTILE] * 2 + ["other"] * 2, "completion": [HOSTILE] * 4, "task": [HOSTILE] * 2 + ["$x"] * 2}
    write_rewards(run_dir, 1, rewards, advantage=[0.5, -0.5, 0.1, -0.1], **texts)
    return Rollouts(run_dir)
