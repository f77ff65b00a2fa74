"""Which setting of a sweep each variant is judged at, and whether a wider sweep could find a better one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from grpo_plus.compare.plan import Arm
from grpo_plus.compare.sweep import Candidate, Setting, Sweep

SMALLEST, LARGEST = "smallest", "largest"


@dataclass(frozen=True)
class Trial:
    """How a candidate did on the choosing seeds and items.

    Attributes:
        by_seed: the mean score of each seed. Empty where a training failed, or where no item has a score in every
            trial: such a candidate is not chosen.
    """

    candidate: Candidate
    by_seed: Sequence[float]
    chosen: bool = False

    @property
    def mean(self) -> float:
        """Over the seeds; NaN without a score."""
        return sum(self.by_seed) / len(self.by_seed) if self.by_seed else float("nan")


@dataclass(frozen=True)
class Edge:
    """A field whose best value is at the edge of the sweep.

    Attributes:
        side: "smallest" or "largest".
        labels: of the variants with that value.
        wider: a value further out, which the configuration accepts.
    """

    field: str
    side: str
    value: float
    labels: Sequence[str]
    wider: float


@dataclass(frozen=True)
class Choices:
    """What a sweep tried and chose.

    Attributes:
        score: the name of the score that the mean is of.
        trials: every variant at every setting, in the order of the sweep.
        edges: the best values beyond which nothing was tried.
    """

    sweep: Sweep
    score: str
    trials: Sequence[Trial]
    edges: Sequence[Edge] = ()

    @property
    def chosen(self) -> dict[str, Candidate]:
        """By label; a variant without a finished setting is missing."""
        return {trial.candidate.label: trial.candidate for trial in self.trials if trial.chosen}

    def arms(self, judging: Sequence[Arm]) -> list[Arm]:
        """The arms that are judged: those of the comparison, at the chosen settings."""
        chosen = self.chosen
        return [Arm(chosen[arm.variant.label].variant, arm.seed) for arm in judging if arm.variant.label in chosen]


def choose(sweep: Sweep, found: Sequence[Candidate], scores: Mapping[Arm, Sequence[float]], score: str) -> Choices:
    """Choose for each variant the setting with the highest mean over the choosing seeds; of equals, the first.

    Args:
        scores: of the choosing half of the items, by arm; arms that are not finished are missing.
        score: the name of the score.
    """
    trials = _trials(sweep, found, scores)
    best: dict[str, Trial] = {}
    for trial in trials:
        label = trial.candidate.label
        if trial.by_seed and (label not in best or trial.mean > best[label].mean):
            best[label] = trial
    marked = [replace(trial, chosen=trial is best.get(trial.candidate.label)) for trial in trials]
    return Choices(sweep, score, marked)


def _trials(sweep: Sweep, found: Sequence[Candidate], scores: Mapping[Arm, Sequence[float]]) -> list[Trial]:
    """Every candidate with its mean by seed, over the items that have a score in all of them.

    A candidate without any score on one of the seeds has no mean, so that it does not leave the others without items.
    """
    arms = [[Arm(candidate.variant, seed) for seed in sweep.seeds] for candidate in found]
    finished = {
        candidate.variant: [scores[arm] for arm in of_one]
        for candidate, of_one in zip(found, arms, strict=True)
        if not any(all(map(math.isnan, scores.get(arm, ()))) for arm in of_one)
    }
    if not finished:
        return [Trial(candidate, []) for candidate in found]
    values = torch.tensor(list(finished.values()), dtype=torch.float64)  # (candidates, S, I)
    values = values[..., ~values.isnan().flatten(0, 1).any(0)]
    means = values.mean(-1).tolist() if values.shape[-1] else [[]] * len(finished)
    by_seed = dict(zip(finished, means, strict=True))
    return [Trial(candidate, by_seed.get(candidate.variant, [])) for candidate in found]


def with_edges(choices: Choices, accepts: Callable[[Candidate, Setting], bool]) -> Choices:
    """The choices with their edges.

    Args:
        accepts: whether the configuration of a chosen candidate takes another setting.
    """
    edges = []
    for field, values in choices.sweep.grid.items():
        for side, value in ((SMALLEST, min(values)), (LARGEST, max(values))):
            there = [candidate for candidate in choices.chosen.values() if candidate.setting[field] == value]
            beyond = wider(values, side)
            if there and beyond is not None and accepts(there[0], {**there[0].setting, field: beyond}):
                edges.append(Edge(field, side, value, [candidate.label for candidate in there], beyond))
    return replace(choices, edges=edges)


def wider(values: Sequence[float], side: str) -> float | None:
    """The next value beyond a sweep, as far from its edge as the edge is from its neighbor.

    By ratio where all values are positive, by difference otherwise. None below a 0, which switches something off, and
    where rounding leads back to the edge or inside.
    """
    ordered = sorted(values, reverse=side == SMALLEST)
    before, edge = ordered[-2:]
    if side == SMALLEST and edge <= 0:
        return None
    beyond = edge * edge / before if min(values) > 0 else edge + (edge - before)
    rounded = round(beyond) if isinstance(edge, int) else float(f"{beyond:.2g}")
    return rounded if (rounded < edge if side == SMALLEST else rounded > edge) else None
