"""How sure a comparison of training runs can be: paired bootstrap over seeds and held-out items.

A training run is the unit of evidence: two estimators differ if they differ on other seeds than these, too, and on
other held-out items. Both are resampled, and every comparison is made on the same resamples, seed by seed.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds; NaN bounds where there are too few seeds for any, or no items."""

    estimate: float
    low: float
    high: float

    @property
    def exists(self) -> bool:
        """Whether there are bounds."""
        return not math.isnan(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside."""
        return self.exists and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Difference:
    """How much `first` scores above `second`."""

    first: str
    second: str
    interval: Interval


def pairs(names: Sequence[str], baseline: str | None = None) -> list[tuple[str, str]]:
    """Every pair, or every other name against `baseline`."""
    if baseline is None:
        return list(combinations(names, 2))
    return [(name, baseline) for name in names if name != baseline]


def differences(scores: Mapping[str, Tensor], compared: Sequence[tuple[str, str]]) -> list[Difference]:
    """Paired differences of mean scores, with simultaneous intervals.

    For each of the pairs, d = mean over S seeds and I items of (first - second). Seeds and items are resampled with
    replacement, independently of each other and alike for all pairs; `spread` is the standard deviation of the
    resampled d. The bounds are

        d ± t * spread * sqrt(S / (S - 1)),    P(|T| > t) = (1 - LEVEL) / pairs

    for Student's T with S - 1 degrees of freedom. Resamples of few seeds vary too little, so the spread is multiplied
    by sqrt(S / (S - 1)). S runs tell little about the size of their own error, and the error differs from pair to pair,
    so the bounds use t. Bonferroni's share of 1 / pairs lets all intervals hold together with the probability LEVEL.
    For all pairs of 4 to 8 variants the share makes the intervals 2 or 3 % wider than need be. A single pair has the t
    interval where seeds alone matter. Crossed resampling errs on the wide side (Owen, "The pigeonhole bootstrap",
    https://arxiv.org/abs/0712.1111).

    The draws are seeded: the same scores give the same bounds.

    Args:
        scores: (S, I) by name: seeds in the same order, and items too.

    Returns:
        One difference per pair; without bounds where there are fewer than 3 seeds, or no items.
    """
    if not compared:
        return []
    stacked = torch.stack([scores[first] - scores[second] for first, second in compared]).double()  # (pairs, S, I)
    estimates = stacked.mean((1, 2))
    low, high = _bounds(stacked, estimates)
    found = zip(compared, estimates.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Difference(*pair, Interval(*values)) for pair, *values in found]


def means(scores: Mapping[str, Tensor]) -> dict[str, Interval]:
    """The mean score of each name with an interval of its own, as `differences` computes it for a single pair."""
    found = {}
    for name, values in scores.items():
        stacked = values.double().unsqueeze(0)
        estimate = stacked.mean((1, 2))
        low, high = _bounds(stacked, estimate)
        found[name] = Interval(estimate.item(), low.item(), high.item())
    return found


def _bounds(values: Tensor, estimates: Tensor) -> tuple[Tensor, Tensor]:
    """Simultaneous bounds (pairs,) of the means of (pairs, S, I) values."""
    seeds, items = values.shape[1:]
    if seeds < FEWEST_SEEDS or items == 0:
        nothing = torch.full_like(estimates, math.nan)
        return nothing, nothing
    generator = torch.Generator().manual_seed(0)
    by_seed = _counts(RESAMPLES, seeds, generator)
    by_item = _counts(RESAMPLES, items, generator)
    by_run = values @ by_item.T  # (pairs, S, R): small beside all items of all resamples
    deviations = (by_run * by_seed.T).sum(1).T - estimates  # (R, pairs)
    spread = deviations.square().mean(0).sqrt()
    critical = t_quantile(seeds - 1, 1 - (1 - LEVEL) / len(values))
    margin = critical * spread * math.sqrt(seeds / (seeds - 1))
    return estimates - margin, estimates + margin


def _counts(resamples: int, size: int, generator: torch.Generator) -> Tensor:
    """(R, size) the weight of each element in each resample; rows sum to 1."""
    drawn = torch.randint(size, (resamples, size), generator=generator)
    counts = torch.zeros(resamples, size, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)) / size


@functools.cache
def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| < t) = `level` for Student's T.

    Write T = sqrt(k) tan(a), for k degrees of freedom. The angle a then has a density proportional to cos(a)^(k-1), on
    a finite range. That density is integrated numerically.
    """
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    area = torch.cumulative_trapezoid(angles.cos() ** (degrees - 1), angles)
    found = int(torch.searchsorted(area, level * area[-1]))
    return math.sqrt(degrees) * math.tan(angles[found + 1].item())


def band(curves: Tensor) -> tuple[Tensor, Tensor]:
    """Pointwise t interval of the mean over seeds: (S, steps) -> bounds (steps,), NaN for fewer than 3 seeds."""
    seeds = curves.shape[0]
    mean = curves.mean(0)
    if seeds < FEWEST_SEEDS:
        return torch.full_like(mean, math.nan), torch.full_like(mean, math.nan)
    margin = t_quantile(seeds - 1) * curves.std(0) / math.sqrt(seeds)
    return mean - margin, mean + margin
