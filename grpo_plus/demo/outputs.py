"""What the demo leaves behind: the log, a picture of it, and a summary, which is written last."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grpo_plus.demo.progress import ACCURACY, CORRECTNESS, FORMAT
from grpo_plus.version import versions

LOG, CURVE, SUMMARY = "log.jsonl", "learning_curve.png", "summary.json"
CURVES = {FORMAT: ("format reward", "#9a9a9a"), CORRECTNESS: ("correctness reward", "#0072b2")}
ACCURACY_COLOR = "#d55e00"


@dataclass(frozen=True)
class DemoResult:
    """What a run measured, on prompts that neither the warm-up nor GRPO saw.

    seconds:  from the first weight to the last file but the summary; importing the libraries comes on top.
    switches: the choices that were in force, by their names in GRPOPlusConfig.
    examples: a few held-out prompts, each with the completion before and after GRPO.
    """

    accuracy_before: float
    accuracy_after: float
    seed: int
    steps: int
    seconds: float
    switches: dict[str, Any]
    examples: list[dict[str, str]]


def write_log(log_history: list[dict[str, Any]], directory: Path) -> None:
    """One JSON object per logged step."""
    (directory / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in log_history), encoding="utf-8")


def write_summary(result: DemoResult, directory: Path) -> None:
    """The result with the versions that produced it; a reader never finds half a file."""
    unfinished = directory / f"{SUMMARY}.tmp"
    unfinished.write_text(json.dumps(asdict(result) | {"versions": versions()}, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(directory / SUMMARY)


def discard_earlier_run(directory: Path) -> Path:
    """Create the directory and remove an earlier run's summary and completions, which would pass for this run's.

    Where there is a summary, the run is complete.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in (directory / SUMMARY, *directory.glob("completions/completions_*.parquet")):
        path.unlink(missing_ok=True)
    return directory


def draw_learning_curve(
    log_history: list[dict[str, Any]], directory: Path, *, accuracy_before: float, title: str
) -> None:
    """Mean rewards of the sampled completions at every step, and greedy accuracy on the held-out prompts."""
    # A Figure of its own, not pyplot: nothing is left open and the caller's backend stays as it is.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (label, color) in CURVES.items():
        axes.plot(*_points(log_history, name), label=label, color=color, linewidth=1.5)
    steps, accuracies = _points(log_history, ACCURACY)
    steps, accuracies = [0, *steps], [accuracy_before, *accuracies]
    axes.plot(steps, accuracies, "o-", label="held-out accuracy (greedy)", color=ACCURACY_COLOR, linewidth=2)
    for index, place in ((0, (12, -5)), (-1, (-16, 8))):
        point = (steps[index], accuracies[index])
        axes.annotate(f"{point[1]:.1%}", point, place, textcoords="offset points", color=ACCURACY_COLOR, weight="bold")
    axes.set(xlabel="GRPO step", ylabel="mean reward, accuracy", ylim=(-0.03, 1.12))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.1), frameon=False)
    figure.savefig(directory / CURVE, dpi=150)


def _points(log_history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[name]) for entry in log_history if entry.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]
