"""The conclusion of a comparison in words: a verdict, how sure it is, and what to do next."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from grpo_plus.compare.intervals import FEWEST_SEEDS, LEVEL, Interval
from grpo_plus.compare.power import MOST
from grpo_plus.compare.sweep_report import choice_lines
from grpo_plus.compare.verdict import ScoreVerdict, caveats
from grpo_plus.report.text import count

GOOD_SEEDS = 5  # with fewer, only large differences can be shown


@dataclass(frozen=True)
class NextStep:
    """What to do next.

    Attributes:
        action: in words.
        variants: labels to compare on `seeds` seeds in all; () where nothing is to be compared.
        winner: the label of the variant to train with; None where something is to be compared.
    """

    action: str
    variants: tuple[str, ...] = ()
    seeds: int = 0
    winner: str | None = None


@dataclass(frozen=True)
class Conclusion:
    """A verdict of one or two sentences under a title, the next step, and what the verdict rests on."""

    title: str
    verdict: str
    step: NextStep
    settled: bool = False
    reasons: tuple[str, ...] = ()


Command = Callable[[NextStep], str]


def conclusion(verdict: ScoreVerdict) -> Conclusion:
    """The conclusion from the verdict on one score."""
    found = _without_differences(verdict) or _from_differences(verdict)
    comparison = verdict.comparison
    reasons = (*_grounds(verdict), *choice_lines(comparison.choices), *caveats(comparison))
    return replace(found, reasons=reasons)


def _without_differences(verdict: ScoreVerdict) -> Conclusion | None:
    """The conclusion where there is nothing to compare, or too little; None where there is enough."""
    comparison, title = verdict.comparison, "Nothing to compare yet"
    labels, seeds = tuple(variant.label for variant in comparison.variants), len(comparison.paired_seeds)
    again = NextStep("Train what is missing with the same command.", labels, len(comparison.seeds))
    if not verdict.means:
        return Conclusion(title, "No arm is finished on a seed that all variants share.", again)
    if len(labels) == 1:
        [label] = labels
        more = NextStep("Compare with another variant: name two or more.")
        return Conclusion(title, f"{_reached(verdict, label)} There is no other variant to compare with.", more)
    if len(verdict.means) == 1:
        return Conclusion(title, "One variant has finished: there is nothing to compare it with.", again)
    best = _best(verdict)
    if math.isnan(verdict.means[best].estimate):
        other = NextStep("Judge by a score that every held-out item has, or by other items.")
        return Conclusion(title, f"No held-out item has a `{verdict.score}` in every arm.", other)
    if seeds < FEWEST_SEEDS:
        wanted = max(GOOD_SEEDS, len(comparison.seeds))
        more = NextStep(f"Train {wanted} seeds. Intervals need {FEWEST_SEEDS}.", labels, wanted)
        text = f"{_reached(verdict, best)} That is the highest mean, but {count(seeds, 'seed')} can show no difference."
        return Conclusion("No answer yet", text, more)
    return None


def _from_differences(verdict: ScoreVerdict) -> Conclusion:
    best = _best(verdict)
    against = verdict.against(best)
    unclear = [label for label, interval in against.items() if not interval.excludes_zero]
    if not unclear:
        step = NextStep(f"Train with `{best}`.", winner=best)
        return Conclusion("One is ahead", _won(verdict, best, against), step, settled=True)
    rival = max(unclear, key=lambda label: verdict.means[label].estimate)
    if against[rival].low == against[rival].high == 0:
        same = f"`{best}` and `{rival}` have the same `{verdict.score}` on every held-out item."
        text = f"{_largest(verdict)} {same}" if verdict.shown() else same
        return Conclusion("No answer", text, NextStep("More steps, or another score, may tell them apart."))
    step = _to_tell(verdict, best, rival)
    if not verdict.shown():
        seeds = count(len(verdict.comparison.paired_seeds), "seed")
        text = (
            f"Nothing here separates the variants. {seeds} can show differences in `{verdict.score}` of "
            f"{_smallest(verdict):.2g} or more only."
        )
        return Conclusion("No answer yet", text, step)
    text = f"{_largest(verdict)} Nothing separates `{best}`, the highest mean, from `{rival}`."
    return Conclusion("An answer in part", text, step)


def _won(verdict: ScoreVerdict, best: str, against: dict[str, Interval]) -> str:
    """The sentence of a winner, by its lead over the nearest."""
    nearest = min(against, key=lambda label: against[label].estimate)
    lead = f"by {_value(against[nearest])} in `{verdict.score}`"
    if len(against) == 1:
        others = [label for label in verdict.means if label not in (best, nearest)]
        alone = f" Only `{nearest}` was compared with each: `{best}` has the highest mean, and may not be the best."
        return f"`{best}` is ahead of `{nearest}` {lead}.{alone if others else ''}"
    return f"`{best}` is ahead of all others: of `{nearest}`, the nearest, {lead}."


def _largest(verdict: ScoreVerdict) -> str:
    """The largest difference that is shown, and how many others are."""
    first, *others = verdict.shown()
    text = f"`{first.first}` is ahead of `{first.second}` by {_value(first.interval)} in `{verdict.score}`"
    return f"{text}; {count(len(others), 'smaller difference')} shown, too." if others else f"{text}."


def _to_tell(verdict: ScoreVerdict, best: str, rival: str) -> NextStep:
    """What would tell the two highest apart."""
    difference = verdict.against(best)[rival].estimate
    if abs(difference) < 1e-12:  # but for rounding
        return NextStep(f"`{best}` and `{rival}` have the same mean. Train with either.", winner=best)
    needed = verdict.seeds_to_tell(best, rival)
    if needed is None:
        action = (
            f"More than {MOST} seeds would be needed to tell `{best}` and `{rival}` apart, if the true difference is "
            f"the one seen ({difference:.2g}). Train with either."
        )
        return NextStep(action, winner=best)
    seeds = len(verdict.comparison.paired_seeds)
    more = max(needed - seeds, 1)
    action = (
        f"To tell `{best}` and `{rival}` apart, train at least {count(more, 'more seed')} of the two, if the true "
        f"difference is the one seen ({difference:.2g})."
    )
    return NextStep(action, (best, rival), seeds + more)


def _grounds(verdict: ScoreVerdict) -> list[str]:
    """How much was measured, and how sure that makes the verdict."""
    if not verdict.means:
        return []
    seeds, items = next(iter(verdict.comparison.scores(verdict.score).values())).shape
    lines = [f"{count(seeds, 'seed')} of each variant, judged on {count(items, 'held-out item')}."]
    if seeds >= FEWEST_SEEDS and items and (pairs := len(verdict.differences)):
        what = "The interval holds" if pairs == 1 else f"All {pairs} intervals of differences hold at once"
        lines.append(f"{what} with a probability of {LEVEL:.0%}.")
        if len(verdict.shown()) < pairs:
            lines[-1] += " An interval that holds 0 does not show equality."
    if all(interval.estimate < verdict.start for interval in verdict.means.values()):
        lines.append(f"Every variant scores below the start, {verdict.start:.3f}: the training made the model worse.")
    return lines


def _best(verdict: ScoreVerdict) -> str:
    return next(iter(verdict.ranked))


def _smallest(verdict: ScoreVerdict) -> float:
    """No smaller difference would be shown for any pair: half the width of the narrowest interval."""
    widths = [(i.high - i.low) / 2 for i in (difference.interval for difference in verdict.differences)]
    return min(width for width in widths if width > 0)  # no training differs from its twin, and that shows nothing


def _reached(verdict: ScoreVerdict, label: str) -> str:
    return f"`{label}` reached {verdict.means[label].estimate:.3f} in `{verdict.score}`, from {verdict.start:.3f}."


def _value(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
