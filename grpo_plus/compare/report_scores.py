"""The scores in the report of a comparison: what each variant reached, how they differ, and what they answer."""

import math
from collections.abc import Mapping, Sequence

from grpo_plus.compare.comparison import Comparison
from grpo_plus.compare.intervals import LEVEL, RESAMPLES, Difference, Interval
from grpo_plus.compare.plan import Arm
from grpo_plus.compare.verdict import ScoreVerdict
from grpo_plus.report.curves import Estimate, Line, intervals
from grpo_plus.report.page import Beside, Block, Figure, Fold, Quote, Table, Text
from grpo_plus.report.svg import round_limits

OPEN_DIFFERENCES = 12  # differences that are shown without being asked for
METHOD = (
    f"Intervals are at {LEVEL:.0%}, from {RESAMPLES:,} paired bootstrap resamples of seeds and held-out items; those "
    "of differences hold together (Student's t for the number of seeds, Bonferroni over the comparisons of a score), "
    "so any of them may be picked out. Those of single means hold one by one, and overlap says nothing about a "
    "difference. Bounds may lie beyond the best or worst possible score."
)


def scores(verdict: ScoreVerdict) -> list[Block]:
    """One score, drawn and in figures: what each variant reached, and how they differ."""
    return [*_drawn(verdict), *_tables(verdict)] if verdict.means else []


def further_scores(verdicts: Sequence[ScoreVerdict]) -> list[Block]:
    """The other scores, each of which opens on demand."""
    return [Fold(f"Held-out `{verdict.score}`", scores(verdict)) for verdict in verdicts if verdict.means]


def method(verdicts: Sequence[ScoreVerdict]) -> list[Block]:
    """How the intervals are made, and the means of single trainings."""
    by_seed = [
        (verdict.score, label, seed, mean)
        for verdict in verdicts
        for label, means in verdict.by_seed.items()
        for seed, mean in zip(verdict.comparison.paired_seeds, means.tolist(), strict=True)
    ]
    table = Table("Held-out scores by seed", ("score", "variant", "seed", "mean"), by_seed, folded=True)
    return [Text(METHOD), *([table] if by_seed else [])]


def completions(comparison: Comparison) -> list[Block]:
    """What the variants answer to the same held-out prompts after training; the first prompt is open."""
    seed = next(iter(comparison.paired_seeds), None)
    if seed is None:
        return []
    found = {variant.label: comparison.samples(Arm(variant, seed)) for variant in comparison.finished}
    by_prompt: dict[str, dict[str, list[str]]] = {}
    for label, samples in {"before training": comparison.start_samples, **found}.items():
        for sample in samples:
            by_prompt.setdefault(sample.prompt, {}).setdefault(sample.completion, []).append(label)
    shown = [_one_prompt(prompt, who) for prompt, who in by_prompt.items()]
    if not shown:
        return []
    text = Text(
        f"The same held-out prompts, answered before training and at its end (seed {seed}), one completion each. Equal "
        "completions are shown once. A few completions are no evidence: the scores are."
    )
    folded = [Fold(f"Prompt {number}", blocks) for number, blocks in enumerate(shown[1:], 2)]
    return [text, *shown[0], *folded]


def _one_prompt(prompt: str, completions: Mapping[str, Sequence[str]]) -> list[Block]:
    """A prompt, and each different completion under the names of those who wrote it."""
    quotes = [Quote(", ".join(f"`{label}`" for label in labels), text) for text, labels in completions.items()]
    return [Quote("Prompt", prompt), Beside("Completions", quotes)]


def _tables(verdict: ScoreVerdict) -> list[Block]:
    reached = [(name, *_cells(interval)) for name, interval in verdict.ranked.items()]
    apart = [(_minus(d), _with_bounds(d.interval), _word(d.interval)) for d in verdict.ordered()]
    left_out = verdict.comparison.left_out(verdict.score)
    caption = f"Held-out `{verdict.score}`; the start has {verdict.start:.3f}"
    if left_out:
        items = left_out + next(iter(verdict.comparison.scores(verdict.score).values())).shape[1]
        caption += f"; {left_out} of {items} items, which some arm has no score for, are left out in all"
    pairs = f"Differences in `{verdict.score}`, paired by seed"
    tables: list[Block] = [Table(caption, ("variant", "mean", "low", "high"), reached)]
    if apart:
        folded = len(apart) > OPEN_DIFFERENCES
        tables.append(Table(pairs, ("pair", "difference", "shown?"), apart, folded=folded))
    return tables


def _drawn(verdict: ScoreVerdict) -> list[Block]:
    return [_drawn_means(verdict), *([_drawn_apart(verdict)] if verdict.differences else [])]


def _drawn_means(verdict: ScoreVerdict) -> Figure:
    by_seed = {name: means.tolist() for name, means in verdict.by_seed.items()}
    seen = [verdict.start, *(value for values in by_seed.values() for value in values)]
    drawing = intervals(
        {name: Estimate(i.estimate, i.low, i.high, by_seed[name]) for name, i in verdict.ranked.items()},
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
    pairs = verdict.ordered()
    if len(pairs) <= OPEN_DIFFERENCES:
        return pairs, ""
    best = next(iter(verdict.ranked))
    kept = [difference for difference in pairs if best in (difference.first, difference.second)]
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
