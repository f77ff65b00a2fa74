"""What `benchmarks.multitask` keeps: a JSON file per scenario with a line per arm, and a summary of all of them.

python -m benchmarks.multitask_results       writes the summary again, from the JSON files
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, describe
from benchmarks.multitask_task import SCENARIOS, TASKS
from grpo_plus.compare.comparison import ArmResult, Comparison
from grpo_plus.compare.intervals import Interval, differences, means, pairs
from grpo_plus.compare.plan import Arm
from grpo_plus.demo.progress import ACCURACY

FOLDER = RESULTS / "multitask"
BASELINE = "grpo"
LOAD = "two processes of one thread each, beside other jobs"
SHARE = "advantages/task_share/"
DETAILS = ("accuracy/", "share/", "reward/")  # share: of the advantages, by task
KEPT = (
    "max_steps",
    "num_generations",
    "per_device_train_batch_size",
    "lr_scheduler_type",
    "loss_type",
    "max_grad_norm",
)
OUTCOMES = {
    "accuracy": "accuracy",
    "curve": "area under the curve",
    "worst_task": "worst task",
    "reward": "weighted reward",
}


def write_results(
    scenario: str, comparison: Comparison, folder: Path = FOLDER, *, command: str = "", load: str = LOAD
) -> Path:
    """Write what the arms measured, with the configuration and the machine; returns the file."""
    first_round = f"python -m benchmarks.multitask FOLDER --scenarios {scenario} --seeds {len(comparison.seeds)}"
    header = {
        "command": command or first_round,
        "machine": describe() | {"load": load},
        "facts": comparison.shared["facts"],
        "config": {name: comparison.shared["config"][name] for name in KEPT},
        "start": {name: round(fmean(scores), 4) for name, scores in comparison.start.items()},
        "failures": {arm.name: text.strip().splitlines()[-1] for arm, text in comparison.failures.items()},
    }
    arms = [arm_of(arm, result, comparison.log(arm)) for arm, result in comparison.results.items()]
    lines = ",\n".join("  " + json.dumps(arm) for arm in arms)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{scenario}.json"
    path.write_text(json.dumps(header, indent=1)[:-2] + f',\n "arms": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return path


def arm_of(arm: Arm, result: ArmResult, log: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's means, at the end and along the way, and which prompts it answers right, as the bits of a number."""
    curve = {entry["step"]: round(entry[ACCURACY], 4) for entry in log if ACCURACY in entry}
    scores = {name: round(fmean(values), 4) for name, values in result.scores.items()}
    by_task = [value for name, value in scores.items() if name.startswith("accuracy/")]
    return {
        "estimator": arm.variant.estimator,
        "seed": arm.seed,
        "scores": scores | shares(log) | {"worst_task": min(by_task), "curve": round(fmean(curve.values()), 4)},
        "curve": {"steps": list(curve), "accuracy": list(curve.values())},
        "right": f"{int(''.join(str(int(score)) for score in result.scores['accuracy']), 2):x}",
        "items": len(result.scores["accuracy"]),
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
    }


def shares(log: list[dict[str, Any]]) -> dict[str, float]:
    """Each task's share of a step's |advantages|, in the mean over the training; 0 in a step without a prompt of it."""
    return {f"share/{task}": round(fmean(entry.get(SHARE + task, 0.0) for entry in log), 4) for task in TASKS}


def write_rates(comparison: Comparison, folder: Path = FOLDER) -> None:
    """Write the accuracy of every estimator under every learning rate, by seed."""
    tried = [
        {
            "estimator": arm.variant.estimator,
            "learning_rate": arm.variant.fields["learning_rate"],
            "seed": arm.seed,
            "accuracy": round(fmean(result.scores["accuracy"]), 4),
        }
        for arm, result in comparison.results.items()
    ]
    lines = ",\n".join(json.dumps(arm) for arm in tried)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tuning.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_summary(folder: Path = FOLDER) -> str:
    """Write summary.md from the scenarios that are there; returns it."""
    paths = {name: folder / f"{name}.json" for name in SCENARIOS}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    text = "\n\n".join(["# Five tasks, several rewards", *(section(name, data) for name, data in found.items())]) + "\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")
    return text


def section(scenario: str, data: dict[str, Any]) -> str:
    """A scenario's tables: means, differences to `grpo` whose intervals hold together, and means by task and reward."""
    arms = paired(data["arms"])
    found = {outcome: by_estimator(arms, outcome) for outcome in OUTCOMES}
    against = {outcome: against_baseline(scores) for outcome, scores in found.items()}
    seeds, prompts = next(iter(found["accuracy"].values())).shape
    return "\n".join([
        f"## {scenario}: " + ", ".join(f"{weight:g} {name}" for name, weight in data["facts"]["weights"].items()),
        "",
        f"{seeds} seeds, {prompts} held-out prompts, {data['config']['max_steps']} steps, accuracy before: "
        f"{data['start']['accuracy']:.3f}; {fmean(arm['cpu_seconds'] for arm in arms):.1f} seconds of a core per arm "
        f"({data['machine']['processor']}, {data['machine']['load']}).",
        "",
        *table("mean", {outcome: means(scores) for outcome, scores in found.items()}),
        "",
        *table(f"minus `{BASELINE}`", against, sign="+"),
        "",
        verdict(against["accuracy"]),
        "",
        *(line for kind in DETAILS for line in (*table("mean", details(arms, kind)), "")),
    ]).rstrip()  # fmt: skip


def paired(arms: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arms of the seeds that every estimator has, by seed."""
    arms = sorted(arms, key=lambda arm: arm["seed"])
    names = {arm["estimator"] for arm in arms}
    having = {arm["seed"]: {other["estimator"] for other in arms if other["seed"] == arm["seed"]} for arm in arms}
    return [arm for arm in arms if having[arm["seed"]] == names]


def by_estimator(arms: Iterable[dict[str, Any]], outcome: str) -> dict[str, Tensor]:
    """Estimator -> (S, I): for the accuracy 1 where a prompt is answered right, for others one mean per seed."""
    rows: dict[str, list[list[float]]] = {}
    for arm in arms:
        bits = f"{int(arm['right'], 16):0{arm['items']}b}"
        values = [float(bit) for bit in bits] if outcome == "accuracy" else [arm["scores"][outcome]]
        rows.setdefault(arm["estimator"], []).append(values)
    return {name: torch.tensor(values) for name, values in rows.items()}


def against_baseline(scores: dict[str, Tensor]) -> dict[str, Interval]:
    """Each estimator's score minus that of `grpo`."""
    return {one.first: one.interval for one in differences(scores, pairs(list(scores), BASELINE))}


def details(arms: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Interval]]:
    """Means by task or by reward, without bounds."""
    found = {name: by_estimator(arms, name) for name in arms[0]["scores"] if name.startswith(kind)}
    nan = float("nan")
    return {
        name: {estimator: Interval(values.mean().item(), nan, nan) for estimator, values in scores.items()}
        for name, scores in found.items()
    }


def verdict(against: dict[str, Interval]) -> str:
    """What the intervals show, and what they leave open."""
    above = [name for name, interval in against.items() if interval.low > 0]
    below = [name for name, interval in against.items() if interval.high < 0]
    unclear = [name for name in against if name not in (*above, *below)]
    parts = {f"More accurate than `{BASELINE}`": above, "less accurate": below, "undecided": unclear}
    return (
        "; ".join(f"{what}: {', '.join(f'`{name}`' for name in names) or 'none'}" for what, names in parts.items())
        + "."
    )


def words(interval: Interval, sign: str = "") -> str:
    """The estimate and its bounds, where there are any."""
    bounds = f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]" if interval.exists else ""
    return f"{round(interval.estimate, 3) + 0.0:{sign}.3f}{bounds}"


def table(corner: str, columns: dict[str, dict[str, Interval]], sign: str = "") -> list[str]:
    """The lines of a Markdown table with a row per estimator."""
    heads = [corner, *(OUTCOMES.get(name, name) for name in columns)]
    names = next(iter(columns.values()))
    rows = [[f"`{name}`", *(words(column[name], sign) for column in columns.values())] for name in names]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


if __name__ == "__main__":
    print(write_summary())
