"""The numbers of a comparison of trainings: curves over the seeds, and every number as a row."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from grpo_plus.compare.choices import Choices
from grpo_plus.compare.comparison import Comparison
from grpo_plus.compare.intervals import band
from grpo_plus.compare.sweep import shown
from grpo_plus.compare.verdict import ScoreVerdict, arms_of
from grpo_plus.report.curves import Curve

REWARD_PREFIX = "rewards/"
# What else of TRL's log is drawn, by its key.
OTHERS = {"completions/mean_length": "mean completion length", "entropy": "entropy"}
CHOOSING, JUDGING = "choosing", "judging"  # halves of the held-out items in a sweep
POINTS = 40  # a curve is smoothed so far that about this many of its points are independent

BOUNDS = ("", "_low", "_high")
JUDGED = {"start", "held_out", *(f"{statistic}{end}" for statistic in ("mean", "difference") for end in BOUNDS)}

ArmLogs = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]


def logs_of(comparison: Comparison) -> ArmLogs:
    """The logged steps of each variant's finished arms, by label."""
    return {
        variant.label: [comparison.log(arm) for arm in arms_of(comparison, variant.label)]
        for variant in comparison.finished
    }


def quantities(logs: ArmLogs) -> dict[str, str]:
    """What can be drawn, with a title: the reward, each reward function's mean, and a few others."""
    keys = list(dict.fromkeys(key for arms in logs.values() for log in arms for entry in log for key in entry))
    each = [key for key in keys if key.startswith(REWARD_PREFIX) and key.endswith("/mean")]
    titles = {"reward": "reward (weighted sum)"} if len(each) > 1 else {}
    titles |= {key: key.removeprefix(REWARD_PREFIX).removesuffix("/mean") for key in each}
    return titles | {key: title for key, title in OTHERS.items() if key in keys}


def window(logs: ArmLogs) -> int:
    """Logged steps that a curve is averaged over."""
    longest = max((len(log) for arms in logs.values() for log in arms), default=1)
    return max(1, longest // POINTS)


def curve(arms: Sequence[Sequence[Mapping[str, Any]]], key: str, width: int) -> Curve | None:
    """The mean over the arms, smoothed, with its band; the steps that all of them logged. None where there are none."""
    series = [{entry["step"]: entry[key] for entry in log if entry.get(key) is not None} for log in arms]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if len(steps) < width:
        return None
    values = torch.tensor([[values[step] for step in steps] for values in series], dtype=torch.float64)
    smooth = values.unfold(1, width, 1).mean(-1)
    low, high = band(smooth)
    ends = [float(step) for step in steps[width - 1 :]]
    return Curve(ends, *(bound.tolist() for bound in (smooth.mean(0), low, high)))


def rows(comparison: Comparison, verdicts: Sequence[ScoreVerdict], logs: ArmLogs) -> list[dict[str, Any]]:
    """Every number as one row: statistic, variant, versus (another variant), seed, step, name, setting, half, value.

    The setting is the variant's in a sweep, and the half that of the held-out items; both are empty without a sweep.
    """
    found = [_row("start", name=name, value=_mean(values), variant="") for name, values in comparison.start.items()]
    for arm in comparison.arms:
        if arm in comparison.results:
            found += _rows_of_arm(comparison, arm.variant.label, arm.seed, asdict(comparison.results[arm]))
    for verdict in verdicts:
        for label, interval in verdict.means.items():
            found += _bound_rows("mean", interval, variant=label, name=verdict.score)
        for difference in verdict.differences:
            pair = {"variant": difference.first, "versus": difference.second}
            found += _bound_rows("difference", difference.interval, name=verdict.score, **pair)
    for label, snr in comparison.signal.snr.items():
        found.append(_row("gradient_snr", variant=label, value=snr))
        for other, cosine in comparison.signal.cosine[label].items():
            found.append(_row("gradient_cosine", variant=label, versus=other, value=cosine))
    keys = quantities(logs)
    for label, arms in logs.items():
        for arm, log in zip(arms_of(comparison, label), arms, strict=True):
            for entry in log:
                where: dict[str, Any] = {"variant": label, "seed": arm.seed, "step": entry["step"]}
                found += [_row("log", name=key, value=entry[key], **where) for key in keys if key in entry]
    return found if comparison.choices is None else _rows_of_sweep(found, comparison.choices)


def _rows_of_sweep(judging: Sequence[dict[str, Any]], choices: Choices) -> list[dict[str, Any]]:
    """The rows of the judged arms with their settings, then a row per choosing training and per variant's choice."""
    settings = {label: shown(candidate.setting) for label, candidate in choices.chosen.items()}
    found = [
        row | {"setting": settings.get(row["variant"], ""), "half": JUDGING if row["statistic"] in JUDGED else ""}
        for row in judging
    ]
    for trial in choices.trials:
        where = {"variant": trial.candidate.label, "setting": shown(trial.candidate.setting), "half": CHOOSING}
        for seed, value in zip(choices.sweep.seeds, trial.by_seed, strict=bool(trial.by_seed)):
            found.append(_row("held_out", name=choices.score, seed=seed, value=value, **where))
        if trial.chosen:
            found.append(_row("chosen", name=choices.score, value=trial.mean, **where))
    return found


def _rows_of_arm(comparison: Comparison, label: str, seed: int, result: dict[str, Any]) -> list[dict[str, Any]]:
    where: dict[str, Any] = {"variant": label, "seed": seed}
    scores = [_row("held_out", name=name, value=_mean(values), **where) for name, values in result["scores"].items()]
    costs = ("seconds", "cpu_seconds", "tokens", "peak_bytes", "steps")
    return [*scores, *(_row("cost", name=name, value=result[name], **where) for name in costs)]


def _bound_rows(statistic: str, interval: Any, **where: Any) -> list[dict[str, Any]]:
    return [
        _row(f"{statistic}{suffix}", value=getattr(interval, name), **where)
        for suffix, name in zip(BOUNDS, ("estimate", "low", "high"), strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return Tensor.nanmean(torch.tensor(values, dtype=torch.float64)).item()


def _row(statistic: str, *, value: float | None, **where: Any) -> dict[str, Any]:
    return (
        {"statistic": statistic, "variant": "", "versus": "", "seed": None, "step": None, "name": ""}
        | {"setting": "", "half": ""}
        | where
        | {"value": None if value is None else float(value)}
    )
