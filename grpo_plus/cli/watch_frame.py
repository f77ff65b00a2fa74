"""One frame of `grpo-plus watch`: how far the run is, a row per figure, and the last completions."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from grpo_plus.cli.figures import duration, figure, rows, sparkline
from grpo_plus.cli.words import for_terminal
from grpo_plus.report.completions import NOT_REWARDS, said
from grpo_plus.report.run_log import RunLog

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

COMPLETIONS, LINES = 3, 3  # shown, and lines of each
LATE, A_MINUTE = 10, 60.0  # steps and seconds without a log, after which a run may have stopped
AROUND = 7  # lines that are neither a figure nor a completion


@dataclass(frozen=True)
class Completion:
    """A row of the newest table of completions.

    Attributes:
        prompt: on one line.
        text: of the completion, on one line.
        rewards: by the name of the function.
    """

    prompt: str
    text: str
    rewards: dict[str, float]


def frame(folder: Path, log: RunLog | None, *, width: int, now: float, height: int | None = None) -> "Group":
    """What is known of a run.

    Args:
        log: None where the run has written none.
        width: columns of the terminal.
        height: its lines, into which as many completions go as have room. None: all of them.
        now: seconds since 1970.
    """
    from rich.console import Group

    if log is None:
        return Group(
            f"[bold]{_text(folder)}[/]",
            "No log yet. GRPOPlusTrainer writes one as it trains; in a run of TRL's, "
            "callbacks=[grpo_plus.RunLogCallback()] does, and every checkpoint holds the log up to then.",
        )
    completions = last_completions(folder)
    figures = _figures(log, width)
    if height is not None:
        completions = completions[: max(height - AROUND - figures.row_count, 0) // (LINES + 1)]
    parts: list[Any] = [_head(folder, log, width, now), figures]
    return Group(*parts, *([_completions(completions, width)] if completions else []))


def last_completions(folder: Path) -> list[Completion]:
    """One completion of each of a few prompts, from the newest table that TRL wrote under `folder`.

    [] where there is no table yet. A table that the run is writing is passed over for the one before.
    """
    for path in sorted(folder.glob("completions/completions_*.parquet"), reverse=True)[:2]:
        try:
            with pq.ParquetFile(path) as file:
                rows = file.read().to_pylist()
        except (OSError, ValueError):
            continue
        completions = [_completion(row) for row in rows if {"prompt", "completion"} <= set(row)]
        first = {completion.prompt: completion for completion in reversed(completions)}
        return list(reversed(first.values()))[:COMPLETIONS]
    return []


def _head(folder: Path, log: RunLog, width: int, now: float) -> "Text":
    from rich.text import Text

    step = f"  step {log.step}" + (f" of {log.max_steps}" if log.max_steps else "")
    bar = max(width // 4, 10)
    room = max(width - len(step) - 2 - bar, 10)
    head = Text(_end(for_terminal(str(folder)), room), style="bold")  # the end tells runs apart
    head.append(step, style="not bold")
    if log.max_steps:
        done = round(min(log.step / log.max_steps, 1) * bar)
        head.append("  " + "━" * done, style="green")
        head.append("━" * (bar - done), style="dim")
    if log.ended:
        head.append("\nfinished", style="not bold green")
        return head.append("\n")
    last = log.entries[-1].time if log.entries else None
    silence = 0.0 if last is None else max(now - last, 0)
    silent = silence > max(LATE * (log.seconds_per_step or 0), A_MINUTE)
    left = "" if log.seconds_left is None or silent else f", {duration(log.seconds_left)} left"
    head.append(f"\n{duration(log.seconds_per_step)} per step{left}", style="not bold")
    if silent:
        head.append(f", nothing logged for {duration(silence)}: it may have stopped", style="not bold yellow")
    elif last is not None:
        head.append(f", last log {duration(silence)} ago", style="not bold dim")
    return head.append("\n")


def _figures(log: RunLog, width: int) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "from", "to", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for words, values in rows(log):
        style = "bold" if words == "reward" else ""
        curve = sparkline(values, max(width - 54, 10))
        table.add_row(_text(words)[:28], figure(values[0]), figure(values[-1]), f"[cyan]{curve}[/]", style=style)
    return table


def _completions(completions: list[Completion], width: int) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(1, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=4)
    table.add_column("rewards", ratio=2, overflow="fold")
    signs = LINES * (width // 2 - 12)  # of a completion's column, with room for the ends of its lines
    for row in completions:
        rewards = ", ".join(f"{_text(name)} {figure(value)}" for name, value in row.rewards.items())
        table.add_row(_text(_end(row.prompt, signs // 2)), _text(_beginning(row.text, signs)), rewards)
    return table


def _completion(row: dict[str, Any]) -> Completion:
    numbers = {name: value for name, value in row.items() if isinstance(value, float) and math.isfinite(value)}
    rewards = {name: value for name, value in numbers.items() if name not in NOT_REWARDS}
    return Completion(_said(row["prompt"]), _said(row["completion"]), rewards)


def _beginning(text: str, signs: int) -> str:
    return text if len(text) <= signs else f"{text[: signs - 1].rstrip()}…"


def _end(text: str, signs: int) -> str:
    return text if len(text) <= signs else f"…{text[1 - signs :].lstrip()}"


def _said(value: Any) -> str:
    """The text of a prompt or a completion: of its last message where it is a conversation."""
    if isinstance(value, list):
        value = said(value[-1].get("content")) if value and isinstance(value[-1], dict) else ""
    return " ".join(str(value).split())


def _text(value: Any) -> str:
    from rich.markup import escape

    return escape(for_terminal(str(value)))
