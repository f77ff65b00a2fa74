"""What a comparison of trainings says, as a report: report.html, results.csv, results.parquet and summary.md."""

from pathlib import Path
from statistics import fmean
from typing import Any

from grpo_plus.compare.comparison import ArmResult, Comparison
from grpo_plus.compare.conclusion import Command, Conclusion, conclusion
from grpo_plus.compare.intervals import FEWEST_SEEDS, LEVEL
from grpo_plus.compare.report_scores import completions, further_scores, method, scores
from grpo_plus.compare.report_start import advantages, signal_and_noise
from grpo_plus.compare.rows import ArmLogs, curve, logs_of, quantities, rows, window
from grpo_plus.compare.sweep_report import sweep_blocks
from grpo_plus.compare.verdict import ScoreVerdict, arms_of, checked_baseline, versions_of
from grpo_plus.report.curves import curves
from grpo_plus.report.files import write_report
from grpo_plus.report.page import Answer, Block, Figure, Number, Quote, Section, Table, Text
from grpo_plus.report.secrets import masked

LARGE_NUMBERS = 3  # variants whose means are on the answer's card


def write_comparison(
    comparison: Comparison, folder: str | Path, *, baseline: str | None = None, command: Command | None = None
) -> list[Path]:
    """Write the report and its data into `folder`, each file whole or not at all; returns their paths.

    Args:
        baseline: the label of the variant that the others are compared with; None: all pairs.
        command: the command that takes a next step; None: the report says the step in words alone.
    """
    chosen = checked_baseline(comparison, baseline)
    verdicts = [ScoreVerdict(comparison, name, chosen) for name in comparison.score_names]
    logs = logs_of(comparison)
    found = conclusion(verdicts[0])
    answer = _answer(found, verdicts[0], "" if command is None else command(found.step))
    lead = "Every variant trained over several seeds from the same start, on the same prompts in the same order."
    title = f"Comparison: {comparison.shared['task']}"
    sections = _sections(comparison, answer, verdicts, logs)
    return write_report(folder, title, lead, sections, rows(comparison, verdicts, logs))


def _sections(comparison: Comparison, answer: Answer, verdicts: list[ScoreVerdict], logs: ArmLogs) -> list[Section]:
    found = [
        Section("Answer", [answer]),
        Section("Held-out scores", [*scores(verdicts[0]), *further_scores(verdicts[1:])]),
        Section("Completions side by side", completions(comparison)),
        Section("Arms that failed", _failures(comparison)),
        Section("Learning curves", _curves(logs)),
        Section("How the settings were chosen", sweep_blocks(comparison)),
        Section("How it was judged", method(verdicts)),
        Section("Advantages at the start", advantages(comparison)),
        Section("Signal and noise of the first gradient", signal_and_noise(comparison)),
        Section("What it cost", _costs(comparison)),
        Section("Configuration and versions", _configuration(comparison)),
    ]
    return [section for section in found if section.blocks]


def _answer(found: Conclusion, verdict: ScoreVerdict, command: str) -> Answer:
    """The card of the first screen."""
    best = list(verdict.ranked.items())[:LARGE_NUMBERS]
    numbers = [Number(f"{verdict.start:.3f}", "before training")] if best else []
    numbers += [Number(f"{interval.estimate:.3f}", f"`{label}`") for label, interval in best]
    return Answer(found.verdict, found.settled, found.title, tuple(numbers), found.reasons, found.step.action, command)


def _curves(logs: ArmLogs) -> list[Block]:
    width = window(logs)
    seeds = max((len(arms) for arms in logs.values()), default=0)
    text = "Means over the seeds of what the sampled completions earned in training"
    text += f", averaged over {width} logged steps" if width > 1 else ""
    text += f"; bands are pointwise {LEVEL:.0%} t intervals over the seeds." if seeds >= FEWEST_SEEDS else "."
    drawn = []
    for key, title in quantities(logs).items():
        found = {label: line for label, arms in logs.items() if (line := curve(arms, key, width)) is not None}
        if found:
            drawn.append(Figure(f"`{title}` in training.", curves(found, title=title)))
    return [Text(text), *drawn] if drawn else []


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
    if not comparison.failures:
        return []
    told = [(arm.name, text.strip().splitlines()[-1][:200]) for arm, text in comparison.failures.items()]
    quotes = [Quote(f"Traceback of {arm.name}", text, folded=True) for arm, text in comparison.failures.items()]
    return [Table("No part of any figure", ("arm", "error"), told), *quotes]


def _configuration(comparison: Comparison) -> list[Block]:
    shared = comparison.shared
    variants = [(variant.label, str(masked(variant.overrides))) for variant in comparison.variants]
    facts = [(name, str(value)) for name, value in shared["facts"].items()]
    fields = [(name, str(value)) for name, value in shared["config"].items()]
    trained: dict[str, dict[str, Any]] = {}
    for found in versions_of(comparison):
        for name, value in found.items():
            trained.setdefault(name, {})[value] = None
    seeds = ("seeds", ", ".join(map(str, comparison.seeds)))
    versions = [(name, ", ".join(values)) for name, values in trained.items()]
    return [
        Table("What the variants set", ("variant", "fields"), variants, folded=True),
        Table("What all arms share", ("", "value"), [seeds, *facts], folded=True),
        Table("Every field that all arms share", ("field", "value"), fields, folded=True),
        Table("Versions that trained it", ("", "value"), versions, folded=True),
    ]
