"""What a comparison of trainings says, as a report: report.html, results.csv, results.parquet and summary.md."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from grpo_plus.compare.comparison import ArmResult, Comparison
from grpo_plus.compare.intervals import FEWEST_SEEDS, LEVEL, RESAMPLES, Difference, Interval
from grpo_plus.compare.rows import ArmLogs, curve, logs_of, quantities, rows, window
from grpo_plus.compare.verdict import ScoreVerdict, arms_of, checked_baseline, in_short, versions_of
from grpo_plus.report.curves import Estimate, Line, curves, intervals
from grpo_plus.report.figures import bars, heatmap, histograms
from grpo_plus.report.files import write_report
from grpo_plus.report.page import Block, Figure, Quote, Section, Table, Text
from grpo_plus.report.secrets import masked
from grpo_plus.report.svg import round_limits

OPEN_DIFFERENCES = 12  # differences that are shown without being asked for
METHOD = (
    f"Intervals are at {LEVEL:.0%}, from {RESAMPLES:,} paired bootstrap resamples of seeds and held-out items; those "
    "of differences hold together (Student's t for the number of seeds, Bonferroni over the comparisons of a score), "
    "so any of them may be picked out. Those of single means hold one by one, and overlap says nothing about a "
    "difference. Bounds may lie beyond the best or worst possible score."
)


def write_comparison(comparison: Comparison, folder: str | Path, *, baseline: str | None = None) -> list[Path]:
    """Write the report and its data into `folder`, each file whole or not at all; returns their paths.

    Args:
        baseline: the label of the variant that the others are compared with; None: all pairs.
    """
    chosen = checked_baseline(comparison, baseline)
    verdicts = [ScoreVerdict(comparison, name, chosen) for name in comparison.score_names]
    logs = logs_of(comparison)
    sections = _sections(comparison, verdicts, logs, baseline)
    lead = (
        "Every variant trained over several seeds from the same start, on the same prompts in the same order. It says "
        "what happened in this setting, with these hyper-parameters, and how sure one can be of it."
    )
    title = f"Comparison: {comparison.shared['task']}"
    return write_report(folder, title, lead, sections, rows(comparison, verdicts, logs))


def _sections(
    comparison: Comparison, verdicts: list[ScoreVerdict], logs: ArmLogs, baseline: str | None
) -> list[Section]:
    failed = [Section("Arms that failed", _failures(comparison))] if comparison.failures else []
    return [
        Section("In short", [Text("", tuple(in_short(comparison, baseline=baseline)))]),
        *failed,
        Section("Held-out scores", [Text(METHOD), *(block for verdict in verdicts for block in _scores(verdict))]),
        Section("Learning curves", _curves(logs)),
        Section("Advantages at the start", _advantages(comparison)),
        Section("Signal and noise of the first gradient", _signal(comparison)),
        Section("What it cost", _costs(comparison)),
        Section("Configuration and versions", _configuration(comparison)),
    ]


def _scores(verdict: ScoreVerdict) -> list[Block]:
    """One score: what each variant reached, and how they differ. The first is drawn and open, the others fold."""
    first = verdict.score == verdict.comparison.score_names[0]
    scores = verdict.comparison.scores(verdict.score)
    reached = [(name, *_cells(interval)) for name, interval in verdict.means.items()]
    apart = [(_minus(d), _with_bounds(d.interval), _word(d.interval)) for d in verdict.differences]
    by_seed = [
        (name, seed, mean)
        for name, values in scores.items()
        for seed, mean in zip(verdict.comparison.paired_seeds, values.mean(1).tolist(), strict=True)
    ]
    left_out = verdict.comparison.left_out(verdict.score)
    caption = f"Held-out `{verdict.score}`; the start has {verdict.start:.3f}"
    if left_out:
        items = left_out + next(iter(scores.values())).shape[1]
        caption += f"; {left_out} of {items} items, which some arm has no score for, are left out in all"
    tables: list[Block] = [
        Table(caption, ("variant", "mean", "low", "high"), reached, folded=not first),
        Table(
            f"Differences in `{verdict.score}`, paired by seed",
            ("pair", "difference", "shown?"),
            apart,
            folded=not first or len(apart) > OPEN_DIFFERENCES,
        ),
        Table(f"Held-out `{verdict.score}` by seed", ("variant", "seed", "mean"), by_seed, folded=True),
    ]
    return [*(_drawn_scores(verdict) if first and verdict.means else []), *tables]


def _drawn_scores(verdict: ScoreVerdict) -> list[Block]:
    return [_drawn_means(verdict), *([_drawn_apart(verdict)] if verdict.differences else [])]


def _drawn_means(verdict: ScoreVerdict) -> Figure:
    by_seed = {name: values.mean(1).tolist() for name, values in verdict.comparison.scores(verdict.score).items()}
    seen = [verdict.start, *(value for values in by_seed.values() for value in values)]
    drawing = intervals(
        {name: Estimate(i.estimate, i.low, i.high, by_seed[name]) for name, i in verdict.means.items()},
        label=verdict.score,
        limits=round_limits(seen),
        line=Line(verdict.start, "start"),
    )
    caption = f"Held-out `{verdict.score}` after training: a disk for the mean over seeds, a ring for each seed."
    return Figure(caption, drawing)


def _drawn_apart(verdict: ScoreVerdict) -> Figure:
    kept, which = _drawn_differences(verdict)
    apart = {_minus(difference): difference.interval for difference in kept}
    ends = [end for i in apart.values() for end in (i.estimate, i.low, i.high)]
    scale = max((abs(i.estimate) for i in verdict.means.values()), default=0.0)
    drawing = intervals(
        {name: Estimate(i.estimate, i.low, i.high) for name, i in apart.items()},
        label=f"difference in {verdict.score}",
        # Differences of a few percent of the scores shall not fill the drawing.
        limits=round_limits(ends, least=scale / 10),
        line=Line(0.0, "no difference"),
        marked=[name for name, interval in apart.items() if interval.excludes_zero],
    )
    caption = f"Differences, paired by seed{which}. An interval that crosses the dashed line shows none."
    return Figure(caption, drawing)


def _drawn_differences(verdict: ScoreVerdict) -> tuple[list[Difference], str]:
    """The differences to draw. Of many, those to the highest mean: all bounds hold at once, so one may choose."""
    if len(verdict.differences) <= OPEN_DIFFERENCES:
        return verdict.differences, ""
    best = max(verdict.means, key=lambda name: verdict.means[name].estimate)
    kept = [difference for difference in verdict.differences if best in (difference.first, difference.second)]
    return kept, f", to `{best}`, the highest mean"


def _cells(interval: Interval) -> tuple[float, float, float]:
    return (round(interval.estimate, 4), round(interval.low, 4), round(interval.high, 4))


def _minus(difference: Difference) -> str:
    return f"{difference.first} - {difference.second}"


def _with_bounds(interval: Interval) -> str:
    bounds = f" [{interval.low:.3f}, {interval.high:.3f}]" if interval.exists else ""
    return f"{interval.estimate:+.3f}{bounds}"


def _word(interval: Interval) -> str:
    if math.isnan(interval.estimate):
        return "nothing was judged"
    if not interval.exists:
        return "too few seeds"
    return "yes" if interval.excludes_zero else "no: includes 0"


def _curves(logs: ArmLogs) -> list[Block]:
    width = window(logs)
    seeds = max((len(arms) for arms in logs.values()), default=0)
    text = "Means over the seeds of what the sampled completions earned in training"
    text += f", averaged over {width} logged steps" if width > 1 else ""
    text += f"; bands are pointwise {LEVEL:.0%} t intervals over the seeds." if seeds >= FEWEST_SEEDS else "."
    blocks: list[Block] = [Text(text)]
    for key, title in quantities(logs).items():
        found = {label: line for label, arms in logs.items() if (line := curve(arms, key, width)) is not None}
        if found:
            blocks.append(Figure(f"`{title}` in training.", curves(found, title=title)))
    return blocks


def _advantages(comparison: Comparison) -> list[Block]:
    signal = comparison.signal
    samples = {label: np.array(values) for label, values in signal.advantages.items()}
    blocks: list[Block] = []
    if signal.groups and samples:
        count = len(next(iter(samples.values())))
        caption = f"The same {count:,} completions of the start under each estimator; what is beyond ±4 is at the edge."
        blocks.append(Figure(caption, histograms(samples)))
        blocks.append(
            Table(
                "Sizes at the start",
                ("variant", "mean |A|", "root mean square", "A = 0"),
                [
                    (label, np.abs(a).mean().item(), np.sqrt((a**2).mean()).item(), (a == 0).mean().item())
                    for label, a in samples.items()
                ],
                folded=True,
            )
        )
    if signal.refused:
        caption = "Estimators that cannot be applied to these rewards"
        blocks.append(Table(caption, ("variant", "reason"), list(signal.refused.items())))
    return blocks


def _signal(comparison: Comparison) -> list[Block]:
    signal = comparison.signal
    if signal.skipped:
        return [Text(f"Not measured: {signal.skipped}.")]
    snr = {label: float("nan") if value is None else value for label, value in signal.snr.items()}
    text = Text(
        f"The gradient of {signal.groups} groups, sampled once from the start, under each estimator: the squared norm "
        "of what the groups have in common, by the variance between groups (`signal_to_noise` has the formula). Its "
        "inverse is the number of groups in a batch whose gradient is half signal. It does not depend on the size of "
        "the advantages, and it is about the first step only. The loss is a token mean without a KL term for all: "
        "variants that differ in loss or other fields alone are alike here."
    )
    if not snr:
        return [text]
    needed = [
        (label, value, 1 / value if value > 0 else None, cosine)
        for (label, value), cosine in zip(snr.items(), _cosines_to_first(signal.cosine), strict=True)
    ]
    first = next(iter(snr))
    blocks: list[Block] = [
        text,
        Figure("Signal to noise of one group's gradient.", bars(snr, label="signal to noise")),
    ]
    if len(snr) > 1:
        names = list(snr)
        matrix = np.array(
            [[np.nan if (c := signal.cosine[a][b]) is None else min(c, 1.0) for b in names] for a in names]
        )
        low = np.floor(np.nanmin(matrix, initial=0.9) * 10) / 10
        caption = "Cosine between the mean gradients. Bright: the same direction, whatever the length."
        blocks.append(Figure(caption, heatmap(names, matrix, label="cosine", low=low, high=1.0)))
    header = ("variant", "signal to noise", "groups for half signal", f"cosine to {first}")
    return [*blocks, Table("The first gradient", header, needed)]


def _cosines_to_first(cosine: Mapping[str, Mapping[str, float | None]]) -> list[float | None]:
    first = next(iter(cosine))
    return [cosine[first][label] for label in cosine]


def _costs(comparison: Comparison) -> list[Block]:
    lines = []
    for variant in comparison.finished:
        results = [comparison.results[arm] for arm in arms_of(comparison, variant.label)]
        lines.append((variant.label, *_means(results)))
    header = ("variant", "seconds", "on a core", "tokens", "peak MB")
    text = Text(
        "Means per arm, of the training alone: seconds that went by, seconds that its threads were on a core, tokens "
        "that the model read and wrote, and the most memory in use (10⁶ bytes resident, or on the accelerator)."
    )
    return [text, Table("Costs", header, lines)]


def _means(results: list[ArmResult]) -> list[float | None]:
    megabytes = [None if r.peak_bytes is None else r.peak_bytes / 1e6 for r in results]
    columns = ([r.seconds for r in results], [r.cpu_seconds for r in results], [r.tokens for r in results], megabytes)
    return [None if None in column else round(fmean(v for v in column if v is not None)) for column in columns]


def _failures(comparison: Comparison) -> list[Block]:
    told = [(arm.name, text.strip().splitlines()[-1][:200]) for arm, text in comparison.failures.items()]
    quotes = [Quote(f"Traceback of {arm.name}", text, folded=True) for arm, text in comparison.failures.items()]
    return [Table("Not part of the figures below", ("arm", "error"), told), *quotes]


def _configuration(comparison: Comparison) -> list[Block]:
    shared = comparison.shared
    variants = [(variant.label, str(masked(variant.overrides))) for variant in comparison.variants]
    facts = [(name, str(value)) for name, value in shared["facts"].items()]
    fields = [(name, str(value)) for name, value in shared["config"].items()]
    trained: dict[str, dict[str, Any]] = {}
    for found in versions_of(comparison):
        for name, value in found.items():
            trained.setdefault(name, {})[value] = None
    return [
        Table("What the variants set", ("variant", "fields"), variants),
        Table("The comparison", ("", "value"), [("seeds", ", ".join(map(str, comparison.seeds))), *facts]),
        Table("Versions that trained it", ("", "value"), [(name, ", ".join(v)) for name, v in trained.items()]),
        Table("Every field that all arms share", ("field", "value"), fields, folded=True),
    ]
