"""Small logs of completions, as TRL writes them: pandas tables, one file per step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd


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
