"""How many seeds would show a difference: the power of the intervals of `intervals.py`, before the seeds are trained.

The interval of one pair leaves zero out where |d| > t se. For a true difference D, the ratio d / se has a noncentral
t distribution with S - 1 degrees of freedom and the shift D / se (Cohen, "Statistical Power Analysis for the Behavioral
Sciences", 1988, chapter 2). The standard error of S seeds is that of the intervals,

    se(S)² = (between + chance) / S + (items + chance / S) * S / (S - 1)

`between` is the variance of the paired difference between seeds. `items` is the part of the error that more seeds leave
as it is: some items suit a variant on every seed, and the items are the same for all seeds. `chance` is what a single
item on a single seed adds. The crossed resampling counts chance three times: in `between`, with the items, and alone
(Owen, "The pigeonhole bootstrap").

The difference that was seen is not the true one, and the winner's is more often too large than too small (Hoenig and
Heisey, "The Abuse of Power", 2001). A number of seeds from here is the least that makes sense, no promise.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_plus.compare.intervals import FEWEST_SEEDS, LEVEL, t_quantile

POWER = 0.8  # the probability with which a true difference shall be shown
MOST = 100  # seeds; beyond, seeds are not what is missing


@dataclass(frozen=True)
class Spread:
    """What is known of the error of a paired difference: its variance between seeds, by items, and by chance."""

    between: float
    items: float
    chance: float = 0.0

    def error(self, seeds: int) -> float:
        """The standard error of the difference over so many seeds."""
        resampled = (self.items + self.chance / seeds) * seeds / (seeds - 1)
        return math.sqrt((self.between + self.chance) / seeds + resampled)


def spread_of(apart: Tensor, margin: float, comparisons: int) -> Spread:
    """The spread that fits an interval.

    Args:
        apart: (S, I) the paired difference of each item on each seed.
        margin: half the width of the interval.
        comparisons: among which the interval holds.
    """
    seeds, items = apart.shape
    error = margin / t_quantile(seeds - 1, 1 - (1 - LEVEL) / comparisons)
    by_seed = apart.double().mean(1, keepdim=True)
    left = apart - by_seed - apart.mean(0) + by_seed.mean()
    chance = left.square().sum().item() / ((seeds - 1) * max(items - 1, 1) * items)
    between = by_seed.var().item()
    resampled = (error**2 - (between + chance) / seeds) * (seeds - 1) / seeds
    return Spread(between, max(0.0, resampled - chance / seeds), chance)


def seeds_needed(difference: float, spread: Spread, *, comparisons: int = 1) -> int | None:
    """The fewest seeds that show the true difference with the probability `POWER`; None where `MOST` do not.

    Args:
        comparisons: whose intervals shall hold together.
    """
    level = 1 - (1 - LEVEL) / comparisons

    def probability(seeds: int) -> float:
        error = spread.error(seeds)
        return power(abs(difference) / error, seeds - 1, level) if error > 0 else float(difference != 0)

    tried = range(FEWEST_SEEDS, MOST + 1)
    found = bisect_left(tried, POWER, key=probability)  # more seeds never have less power
    return tried[found] if found < len(tried) else None


def power(shift: float, degrees: int, level: float = LEVEL) -> float:
    """P(T > t) for a noncentral t with that shift, where t bounds a share `level` of Student's T.

    T = (Z + shift) / u for a standard normal Z and u² = χ²/degrees, so P(T > t) is the mean of Φ(shift - t u) over u.
    The mean is a numerical integral over the density of u, proportional to u^(degrees - 1) exp(-degrees u² / 2).
    """
    u = torch.linspace(0, 5, 4001, dtype=torch.float64)[1:]
    density = torch.softmax((degrees - 1) * u.log() - degrees * u.square() / 2, 0)
    return (density * torch.special.ndtr(shift - t_quantile(degrees, level) * u)).sum().item()
