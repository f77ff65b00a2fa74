"""What a comparison shows, in words, and nothing that its intervals do not show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from grpo_plus.compare.comparison import Comparison
from grpo_plus.compare.intervals import FEWEST_SEEDS, LEVEL, Difference, Interval, differences, means, pairs
from grpo_plus.compare.plan import Arm, Variant
from grpo_plus.registry import suggestion

LISTED = 8  # differences that are named one by one


@dataclass(eq=False)
class ScoreVerdict:
    """The intervals of one held-out score, and what they say.

    baseline: the label that all others are compared with; None: all pairs.
    """

    comparison: Comparison
    score: str
    baseline: str | None = None

    @cached_property
    def means(self) -> dict[str, Interval]:
        """Each variant's mean, each with an interval of its own."""
        return means(self.comparison.scores(self.score))

    @cached_property
    def differences(self) -> list[Difference]:
        """The pairs, with intervals that hold together."""
        scores = self.comparison.scores(self.score)
        return differences(scores, pairs(list(scores), self.baseline))

    @property
    def start(self) -> float:
        """The mean score before training."""
        values = [value for value in self.comparison.start[self.score] if value == value]
        return sum(values) / len(values) if values else float("nan")

    def lines(self) -> list[str]:
        """The result as sentences."""
        if not self.means:
            return ["No arm is finished on a seed that all variants share: there is nothing to compare."]
        lines = [self._ranking()]
        seeds = len(self.comparison.paired_seeds)
        if len(self.means) == 1:
            return [*lines, "One variant has finished: there is nothing to compare it with."]
        if math.isnan(next(iter(self.means.values())).estimate):
            return [*lines, f"No held-out item has a `{self.score}` in every arm, so no difference is claimed."]
        if seeds < FEWEST_SEEDS:
            return [*lines, f"{_count(seeds, 'seed')}: too few for intervals over runs, so no difference is claimed."]
        shown = [difference for difference in self.differences if difference.interval.excludes_zero]
        return [*lines, *(self._shown(shown) if shown else [self._nothing_shown()])]

    def _ranking(self) -> str:
        ordered = sorted(self.means.items(), key=lambda item: -item[1].estimate)
        each = ", ".join(f"`{name}` {_value(interval)}" for name, interval in ordered)
        seeds = _count(len(self.comparison.paired_seeds), "seed")
        return f"Mean held-out `{self.score}` over {seeds}: {each}. Before training it was {self.start:.3f}."

    def _shown(self, shown: Sequence[Difference]) -> list[str]:
        ordered = sorted(shown, key=lambda difference: -abs(difference.interval.estimate))
        lines = [_sentence(difference, self.score) for difference in ordered[:LISTED]]
        if len(ordered) > LISTED:
            lines.append(f"{len(ordered) - LISTED} smaller differences are shown, too: see the table.")
        others = len(self.differences) - len(shown)
        if others:
            lines.append(
                f"For the other {others} of {_count(len(self.differences), 'comparison')} the interval includes 0: no "
                "difference is shown, which does not show that there is none."
            )
        return lines

    def _nothing_shown(self) -> str:
        widest = max(self.differences, key=lambda d: max(abs(d.interval.low), abs(d.interval.high)))
        bound = max(abs(widest.interval.low), abs(widest.interval.high))
        compared = _count(len(self.differences), "comparison")
        if bound == 0:
            return (
                f"No difference in `{self.score}` is shown: {compared}, and every arm of a seed has the same score on "
                "every held-out item. More steps, or another score, may tell them apart."
            )
        return (
            f"No difference in `{self.score}` is shown: {compared}, and every {LEVEL:.0%} interval includes 0. That "
            f"does not show that there is none: differences of up to {bound:.3f} "
            f"(`{widest.first}` and `{widest.second}`) fit these runs. More seeds narrow the intervals."
        )


def in_short(comparison: Comparison, *, baseline: str | None = None) -> list[str]:
    """The verdict on the first score, and what stands in its way."""
    lines = ScoreVerdict(comparison, comparison.score_names[0], checked_baseline(comparison, baseline)).lines()
    if comparison.failures:
        names = ", ".join(f"`{arm.name}`" for arm in comparison.failures)
        lines.append(
            f"{_count(len(comparison.failures), 'arm')} failed: {names}. The same command tries again. No figure "
            "counts a failure against its variant: if the training itself broke down, the variant looks better than it "
            "is."
        )
    left_out = [seed for seed in comparison.seeds if seed not in comparison.paired_seeds]
    if left_out and comparison.paired_seeds:
        names = ", ".join(map(str, left_out))
        lines.append(f"Left out, for not every variant has finished on it: seed {names}.")
    for variant in comparison.variants:
        if variant not in comparison.finished:
            lines.append(f"`{variant.label}` has not finished on any seed and is not compared.")
    if len(set(map(str, versions_of(comparison)))) > 1:
        lines.append("The arms were trained with different versions of the packages: see the last section.")
    return lines


def check_baseline(variants: Sequence[Variant], baseline: str | None) -> None:
    """Raise ValueError for a baseline that is none of the variants."""
    labels = [variant.label for variant in variants]
    if baseline is not None and baseline not in labels:
        raise ValueError(f"There is no variant {baseline!r} to compare with.{suggestion(baseline, labels)}")


def checked_baseline(comparison: Comparison, baseline: str | None) -> str | None:
    """The baseline; None where it has no result, so that all pairs are compared."""
    check_baseline(comparison.variants, baseline)
    return baseline if baseline in [variant.label for variant in comparison.finished] else None


def versions_of(comparison: Comparison) -> list[dict[str, str]]:
    """What trained each finished arm, in order."""
    return [comparison.results[arm].versions for arm in comparison.arms if arm in comparison.results]


def arms_of(comparison: Comparison, label: str) -> list[Arm]:
    """The finished arms of a variant."""
    return [arm for arm in comparison.arms if arm.variant.label == label and arm in comparison.results]


def _sentence(difference: Difference, score: str) -> str:
    first, second, interval = difference.first, difference.second, difference.interval
    if interval.estimate < 0:
        first, second = second, first
        interval = Interval(-interval.estimate, -interval.high, -interval.low)
    return (
        f"`{first}` scores above `{second}` in `{score}`, by {interval.estimate:.3f} "
        f"[{interval.low:.3f}, {interval.high:.3f}]."
    )


def _value(interval: Interval) -> str:
    return f"{interval.estimate:.3f}" + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval.exists else "")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
