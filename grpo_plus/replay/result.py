"""What a replay found, as values: the statistics by estimator, and a few groups to look at."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo_plus.replay.advice import DEFAULT, Advice, advise
from grpo_plus.replay.alike import Family, families
from grpo_plus.replay.command import compare_command
from grpo_plus.replay.evidence import Evidence
from grpo_plus.replay.recipes import Recipe
from grpo_plus.replay.rollouts import Rollouts
from grpo_plus.replay.statistics import Statistics

# The row of the advantages that the run itself trained on.
LOGGED = "logged"
FACTOR = 10.0  # by which a reward is rescaled to see who reacts
# TRL computes in float32, the replay in float64; rewards of about 1 with a std of .1 leave 1e-6 between them.
SAME = 1e-5


@dataclass(frozen=True)
class Reaction:
    """What an estimator does when the reward `reward` is multiplied by `FACTOR`, over the sampled batches.

    Attributes:
        size: mean |A| after by mean |A| before. 1: it does not notice. FACTOR: all of it reaches the update.
        cosine: between the advantages before and after. 1: the update keeps its direction.
    """

    estimator: str
    reward: str
    size: float
    cosine: float


@dataclass(frozen=True)
class ShownGroup:
    """The completions of one prompt, side by side.

    Attributes:
        group: the number of the group in its batch.
        rewards: (G, K).
        advantages: (E, G), a row for each of the replay's names.
        disagreement: how far the estimators are apart, each in units of its own root mean square in the batch.
    """

    path: Path
    step: int
    group: int
    rows: tuple[int, ...]
    rewards: Tensor
    advantages: Tensor
    disagreement: float
    prompt: str = ""
    completions: tuple[str, ...] = ()


@dataclass(eq=False)
class Replay:
    """What `replay` found.

    Attributes:
        names: the estimators that could be replayed, and LOGGED at the end where the log holds advantages.
        recipes: what was replayed under each name.
        refused: why an estimator could not be replayed, by name.
        statistics: a row per name.
        evidence: what the rewards look like, whatever the estimator.
        difference: for each estimator the relative RMS difference to LOGGED, over groups whose rewards differ. Empty
            where the log has no advantages, or none but 0 there.
        sample: (E, n) advantages of evenly spaced batches.
        steps: the first and the last.
    """

    rollouts: Rollouts
    names: list[str]
    recipes: dict[str, Recipe]
    refused: dict[str, str]
    statistics: Statistics
    evidence: Evidence
    difference: dict[str, float]
    reactions: list[Reaction]
    sample: Tensor
    groups: list[ShownGroup]
    steps: tuple[int, int]

    @property
    def same(self) -> list[str]:
        """The estimators whose advantages are those that the run trained on, closest first."""
        found = [name for name, difference in self.difference.items() if difference <= SAME]
        return sorted(found, key=self.difference.__getitem__)

    @property
    def own(self) -> str | None:
        """The recipe that the run trained with; None where neither its advantages nor its record say."""
        recorded = [name for name, recipe in self.recipes.items() if recipe.recorded and name not in self.refused]
        if not self.difference:
            return next(iter(recorded), None)
        return next((name for name in (*recorded, DEFAULT, *self.same) if name in self.same), None)

    @cached_property
    def families(self) -> list[Family]:
        """The names, those together that ask for the same update, and the run's own first."""
        lead = next(name for name in (self.own, DEFAULT, *self.names) if name in self.names)
        return families(self.names, self.statistics.products(), str(lead))

    @cached_property
    def advice(self) -> Advice:
        """What the log says about the choice of an estimator."""
        recipe = self.recipes[self.own] if self.own else None
        dead = dict(zip(self.names, self.statistics.dead().tolist(), strict=True))
        dead.pop(LOGGED, None)
        if recipe is not None and self.own is not None:
            dead[recipe.estimator.name] = dead.pop(self.own)
        same = [family.names for family in self.families if self.own in family.names]
        return advise(
            self.evidence,
            current=recipe.estimator.name if recipe else None,
            same=same[0] if same else (),
            dead=dead,
            refused=self.refused,
        )

    @property
    def shares_of_rewards(self) -> dict[Family, dict[str, float]]:
        """By family, the share of Σ|A| that each reward accounts for."""
        shares = self.statistics.reward_share()
        names = self.statistics.names
        return {f: dict(zip(names, shares[f.index].tolist(), strict=True)) for f in self.families}

    @property
    def shares_of_tasks(self) -> dict[Family, dict[str, float]]:
        """By family, the share of Σ|A| of each task. Empty without tasks."""
        tasks = self.statistics.task_share()
        return {f: {task: share[f.index].item() for task, share in tasks.items()} for f in self.families if tasks}

    @property
    def next_command(self) -> str:
        """The command that trains what `advice` wants compared."""
        return compare_command(self.advice, self.rollouts, self.recipes[self.own] if self.own else None)

    def rows(self) -> list[dict[str, Any]]:
        """Every number as one row: statistic, estimator, versus (another estimator), reward, task, value."""
        s = self.statistics
        rows = [_row("dead_groups", e, value) for e, value in self._each(s.dead())]
        rows += [_row("zero_advantages", e, value) for e, value in self._each(s.zero())]
        rows += [_row("effective_samples", e, value) for e, value in self._each(s.effective())]
        rows += [_row("mean_abs", e, value) for e, value in self._each(s.mean_size())]
        rows += [_row("rms", e, value) for e, value in self._each(s.rms())]
        rows += [_row("difference_to_logged", e, value) for e, value in self.difference.items()]
        for statistic, matrix in (("rank_correlation", s.correlation()), ("sign_flips", s.flips())):
            for e, line in self._each(matrix):
                rows += [_row(statistic, e, value, versus=f) for f, value in self._each(line) if f != e]
        for e, shares in self._each(s.reward_share()):
            shares = dict(zip(s.names, shares.tolist(), strict=True))
            rows += [_row("share_of_size", e, value, reward=name) for name, value in shares.items()]
        for task, shares in s.task_share().items():
            rows += [_row("share_of_size", e, value, task=task) for e, value in self._each(shares)]
        rows += [_row("zero_spread", "", value, reward=name) for name, value in s.flat_share().items()]
        for reaction in self.reactions:
            rows.append(_row("rescaled_size", reaction.estimator, reaction.size, reward=reaction.reward))
            rows.append(_row("rescaled_cosine", reaction.estimator, reaction.cosine, reward=reaction.reward))
        return rows

    def _each(self, values: Tensor) -> list[tuple[str, Any]]:
        return [(name, value if value.dim() else value.item()) for name, value in zip(self.names, values, strict=True)]


def _row(statistic: str, estimator: str, value: float, **where: str) -> dict[str, Any]:
    return {"statistic": statistic, "estimator": estimator, "versus": "", "reward": "", "task": "", **where} | {
        "value": float(value)
    }
