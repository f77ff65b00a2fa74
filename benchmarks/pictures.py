"""Pictures of the README, drawn from result files: a learning curve, and whole steps beside TRL.

python -m benchmarks.pictures

Reads benchmarks/results/real_model.json and step.json, writes docs/real_model.svg and docs/speed.svg. A picture carries
two sets of colors, and takes the one that suits the reader's screen, light or dark.
"""

import json
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.machine import RESULTS
from benchmarks.step import PHASES
from grpo_plus.report.svg import INK, SERIES, SOFT, WIDTH, settings, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

DOCS = RESULTS.parents[1] / "docs"
NAMES = {"trl": "TRL", "plus": "grpo_plus"}
COLORS = {"trl": SERIES[0], "plus": SERIES[1]}
WIDTHS = {"trl": 3.6, "plus": 1.6}  # TRL's line shows where grpo_plus lies upon it
LIGHTER = 0.55
CASES = {
    "256,64,8": "prompts of 256 tokens, completions to 64",
    "1024,48,8": "prompts of 1,024 tokens, completions to 48",
    "64,256,8": "prompts of 64 tokens, completions to 256",
    "256,64,8 dead": "256 and 64 tokens, two of five groups dead",
    "saved model": "SmolLM2-135M with LoRA, 64 completions",
}
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'  # a file of its own needs it
THEME = """<style>
  svg { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --s1: #6e7781; --s2: #0a5ea8; --s3: #1a7f5a; --s4: #c2570c;
    --s5: #9b3aa0; --s6: #b3264b; --s7: #7a6000; }
  @media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --soft: #9da7b3; --line: #3a434d; --s1: #a5afba;
    --s2: #6cb6ff; --s3: #57c99a; --s4: #f69d50; --s5: #dc9be0; --s6: #ff8fa6; --s7: #d9bd4a; } }
</style>"""


def main() -> None:
    """Draw both."""
    write("real_model.svg", learning(json.loads((RESULTS / "real_model.json").read_text())))
    write("speed.svg", speed(json.loads((RESULTS / "step.json").read_text())))


def write(name: str, svg: str) -> None:
    """Write a drawing of `grpo_plus.report` into docs/, as a file of its own with light and dark colors."""
    opening, rest = svg.replace("<svg ", f"<svg {NAMESPACE} ", 1).split(">", 1)
    (DOCS / name).write_text(f"{opening}>\n{THEME}{rest}\n", encoding="utf-8")


def learning(result: dict[str, Any]) -> str:
    """Held-out accuracy of both sides by step, and by CPU minutes of training: a thin line per seed, a thick mean."""
    with settings():
        figure = _new_figure(2.5)
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for side in NAMES:
            runs = [run for name, run in result["runs"].items() if name.startswith(side)]
            _lines(by_step, side, [_by_step(run) for run in runs])
            at, share = _lines(by_time, side, [_by_minutes(run) for run in runs])
            by_time.annotate(f"{share:.0%}", (at, share), (0, 6), textcoords="offset points", ha="right", color=INK)
        by_step.set_ylim(0, 1)
        by_step.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        by_step.set_xticks(list(_by_step(runs[0])))
        _finish(by_step, "held-out sums right, by step", "step")
        _finish(by_time, "and by the time that the steps take", "minutes of one CPU core")
        by_time.legend(loc="lower right")
        return to_svg(figure, "Share of held-out sums that SmolLM2-135M gets right, with TRL and with grpo_plus.")


def _by_step(run: dict[str, Any]) -> dict[float, float]:
    return {int(step): share for step, share in run["accuracy"].items()}


def _by_minutes(run: dict[str, Any]) -> dict[float, float]:
    """Accuracy by the CPU minutes of the steps before it."""
    seconds = [0.0, *accumulate(sum(entry[f"profile/{phase}"] for phase in PHASES) for entry in run["log"])]
    return {seconds[step] / 60: share for step, share in _by_step(run).items()}


def _lines(axes: "Axes", side: str, runs: list[dict[float, float]]) -> tuple[float, float]:
    """Draw the runs and their mean, and return where the mean ends."""
    width = WIDTHS[side]
    for run in runs:
        axes.plot(list(run), list(run.values()), color=COLORS[side], linewidth=0.4 * width, alpha=0.45)
    at = [fmean(places) for places in zip(*runs, strict=True)]
    shares = [fmean(values) for values in zip(*(run.values() for run in runs), strict=True)]
    axes.plot(at, shares, "o-", color=COLORS[side], linewidth=width, markersize=2 + width, label=NAMES[side])
    return at[-1], shares[-1]


def _finish(axes: "Axes", title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=8, color=INK)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(axis="y", alpha=0.6)


def speed(result: dict[str, Any]) -> str:
    """Time of a step as a share of TRL's: generation and the rest, two bars per case."""
    with settings():
        figure = _new_figure(0.42 * len(CASES) + 0.75)
        axes = figure.add_subplot()
        for row, name in enumerate(CASES):
            for offset, side in ((-0.19, "trl"), (0.19, "plus")):
                _bar(axes, row + offset, side, result["cases"][name])
        axes.set_yticks(range(len(CASES)), list(CASES.values()))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.grid(axis="x", alpha=0.6)
        axes.set_xlabel("seconds of a whole step on one CPU core, as a share of TRL's")
        figure.legend(handles=_keys(), loc="outside upper left", ncols=4, handlelength=1, columnspacing=1.2)
        return to_svg(figure, "Seconds of a whole step with TRL and with grpo_plus, by case.")


def _bar(axes: "Axes", at: float, side: str, case: dict[str, Any]) -> None:
    """Generation in a lighter shade, the rest behind it, and the seconds at the end."""
    whole = case["step_s"]["trl"]
    step, generate = case["step_s"][side] / whole, case["seconds"][side]["generate_s"] / whole
    axes.barh(at, generate, 0.34, color=COLORS[side], alpha=LIGHTER)
    axes.barh(at, step - generate, 0.34, left=generate, color=COLORS[side])
    said = f"{case['step_s'][side]:.1f} s" + (f", {case['speed_up']:.1f}x" if side == "plus" else "")
    axes.annotate(said, (step, at), (4, 0), textcoords="offset points", va="center", color=SOFT, fontsize=6.5)


def _keys() -> list["Patch"]:
    from matplotlib.patches import Patch

    parts = {"generation": LIGHTER, "rewards and update": 1.0}
    return [
        Patch(color=COLORS[side], alpha=alpha, label=f"{name}, {part}")
        for side, name in NAMES.items()
        for part, alpha in parts.items()
    ]


def _new_figure(height: float) -> "Figure":
    """A figure for a wide page, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(2 * WIDTH, height), layout="constrained")


if __name__ == "__main__":
    main()
