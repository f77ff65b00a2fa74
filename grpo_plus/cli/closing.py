"""What `grpo-plus train` says at the end: what was learned, where the time went, where things are, what is next."""

from pathlib import Path
from typing import TYPE_CHECKING

from grpo_plus.cli.figures import duration, figure, rows
from grpo_plus.cli.words import for_terminal
from grpo_plus.report.run_log import LOG_FILE, Entry, RunLog

if TYPE_CHECKING:
    from rich.table import Table

    from grpo_plus import GRPOPlusTrainer

LEARNED = ("reward", "rewards/{}/mean", "eval_reward", "eval_rewards/{}/mean", "eval_pass@{}", "guard/skipped_steps")
PHASES = {"generate": "profile/generate_s", "score": "profile/score_s", "update": "profile/update_s"}


def closing_table(trainer: "GRPOPlusTrainer", seconds: float) -> "Table":
    """A row for each thing that somebody wants to know of a finished training.

    Args:
        seconds: of the training.
    """
    from rich.markup import escape
    from rich.table import Table

    log = _log_of(trainer)
    table = Table(
        title=f"{log.step} steps in {duration(seconds)}", title_justify="left", title_style="bold", show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for words, values in rows(log, LEARNED):
        first, last = _ends(values)
        table.add_row(escape(for_terminal(words)), f"{figure(first)} → {figure(last)}")
    if phases := _phases(log):
        table.add_row("time per step", phases)
    for words, place in _places(trainer).items():
        table.add_row(words, escape(for_terminal(place)))
    return table


def next_commands(trainer: "GRPOPlusTrainer") -> list[str]:
    """Lines to copy, each with what it is for."""
    from grpo_plus.models.adapters import has_adapters

    folder = trainer.args.output_dir
    lines = {}
    if has_adapters(trainer.model):
        lines[f"grpo-plus merge {folder} {folder}-merged"] = "one model without adapters"
    if trainer.args.log_completions:
        lines[f"grpo-plus replay {folder}"] = "what other estimators would have made of it"
    lines[f"grpo-plus watch {folder} --once"] = "its curves"
    width = max(map(len, lines))
    return [f"  {line:<{width}}  {purpose}" for line, purpose in lines.items()]


def _log_of(trainer: "GRPOPlusTrainer") -> RunLog:
    history = trainer.state.log_history
    return RunLog(tuple(Entry(line["step"], None, line) for line in history), trainer.state.max_steps, ended=True)


def _ends(values: list[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth: single batches are noisy."""
    count = max(len(values) // 10, 1)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def _phases(log: RunLog) -> str:
    means = {}
    for phase, name in PHASES.items():
        if values := [value for _, value in log.series(name)]:
            means[phase] = sum(values) / len(values)
    total = sum(means.values())
    if not total:
        return ""
    shares = ", ".join(f"{phase} {mean / total:.0%}" for phase, mean in means.items())
    return f"{duration(total)}: {shares}"


def _places(trainer: "GRPOPlusTrainer") -> dict[str, str]:
    from grpo_plus.models.adapters import has_adapters

    folder = Path(trainer.args.output_dir)
    places = {"adapter" if has_adapters(trainer.model) else "model": str(folder), "log": str(folder / LOG_FILE)}
    if best := trainer.state.best_model_checkpoint:
        places["best checkpoint"] = best
    if trainer.args.log_completions:
        places["completions"] = str(folder / "completions")
    return places
