"""What the intervals of a comparison show, score by score, and what limits them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from grpo_plus.compare.comparison import Comparison
from grpo_plus.compare.intervals import Difference, Interval, differences, means, pairs
from grpo_plus.compare.plan import Arm, Variant
from grpo_plus.compare.power import seeds_needed, spread_of
from grpo_plus.registry import suggestion
from grpo_plus.report.text import count


@dataclass(eq=False)
class ScoreVerdict:
    """The intervals of one held-out score.

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

    @property
    def by_seed(self) -> dict[str, Tensor]:
        """The mean score (S,) of each variant on each seed."""
        return {label: values.mean(1) for label, values in self.comparison.scores(self.score).items()}

    @property
    def ranked(self) -> dict[str, Interval]:
        """The means, the highest first."""
        return dict(sorted(self.means.items(), key=lambda item: -item[1].estimate))

    def shown(self) -> list[Difference]:
        """The differences whose intervals leave out zero, each turned so that the first is ahead; the largest first."""
        found = [_turned(difference) for difference in self.differences if difference.interval.excludes_zero]
        return sorted(found, key=lambda difference: -difference.interval.estimate)

    def ordered(self) -> list[Difference]:
        """The differences for people, the largest first: to the baseline, or turned so that the first is ahead."""
        turned = self.differences if self.baseline is not None else [_turned(pair) for pair in self.differences]
        return sorted(turned, key=lambda difference: -difference.interval.estimate)

    def against(self, label: str) -> dict[str, Interval]:
        """How far `label` is ahead of each variant that it is compared with."""
        both_ways = [way for difference in self.differences for way in (difference, _swapped(difference))]
        return {way.second: way.interval for way in both_ways if way.first == label}

    def seeds_to_tell(self, first: str, second: str) -> int | None:
        """How many seeds would tell the two apart, compared alone, if the true difference is the one seen."""
        interval, scores = self.against(first)[second], self.comparison.scores(self.score)
        margin = (interval.high - interval.low) / 2
        spread = spread_of(scores[first] - scores[second], margin, len(self.differences))
        return seeds_needed(interval.estimate, spread)


def first_verdict(comparison: Comparison, baseline: str | None = None) -> ScoreVerdict:
    """The verdict on the first score, which the conclusion is about."""
    return ScoreVerdict(comparison, comparison.score_names[0], checked_baseline(comparison, baseline))


def caveats(comparison: Comparison) -> list[str]:
    """What stands in the way of the verdict, or limits it."""
    lines = []
    if comparison.failures:
        names = ", ".join(f"`{arm.name}`" for arm in comparison.failures)
        lines.append(
            f"{count(len(comparison.failures), 'arm')} failed: {names}. The same command tries again. No figure "
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


def _swapped(difference: Difference) -> Difference:
    interval = difference.interval
    return Difference(difference.second, difference.first, Interval(-interval.estimate, -interval.high, -interval.low))


def _turned(difference: Difference) -> Difference:
    return difference if difference.interval.estimate > 0 else _swapped(difference)
