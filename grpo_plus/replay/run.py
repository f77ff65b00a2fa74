"""Every estimator over the completions of one run: what each would have made of the same rewards.

The log is read once, in the order of the steps, so that estimators with memory see what they would have seen. A replay
says how estimators differ in the update that they ask for. It does not say what a policy would have generated next
under another estimator.
"""

import heapq
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from grpo_plus.advantages import State, checked, estimate
from grpo_plus.advantages.reductions import cosine, has_spread
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.replay.evidence import evidence_of
from grpo_plus.replay.recipes import Recipe, chosen_recipes
from grpo_plus.replay.result import FACTOR, LOGGED, Reaction, Replay, ShownGroup
from grpo_plus.replay.rollouts import RolloutBatch, Rollouts
from grpo_plus.replay.statistics import Statistics

CHUNK = 8192  # completions that are worked on together: what a call costs is shared by many small batches
SAMPLED = 64  # batches, evenly spaced, for histograms and for reactions
MEASURED = 2**16  # completions, evenly spaced batches, whose rewards are looked at together
Part = TypeVar("Part")


def replay(
    rollouts: Rollouts,
    estimators: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    *,
    groups: Sequence[tuple[int, int]] = (),
    examples: int = 4,
    progress: bool = False,
) -> Replay:
    """Recompute the advantages of a run's completions under every estimator, and compare them.

    Args:
        estimators: names or dotted paths, or a mapping to their hyper-parameters. Where None: every registered one, and
            what the run itself recorded.
        groups: (step, number of the group in its batch) to show side by side. Where none, the `examples` groups that
            the estimators disagree about most.
        progress: whether to show a bar.

    Raises:
        ValueError: an estimator is unknown, none can be applied to these rewards, nothing of the log can be used, or
            a group is not in it.
    """
    log_pass = _Pass(rollouts, chosen_recipes(estimators, rollouts), groups, examples)
    for chunk in _chunks(rollouts.batches(progress=progress)):
        log_pass.add(chunk)
    return log_pass.finish()


def _chunks(batches: Iterator[RolloutBatch]) -> Iterator[list[RolloutBatch]]:
    """Successive batches of one shape, together."""
    chunk: list[RolloutBatch] = []
    for batch in batches:
        if chunk and (_shape(batch) != _shape(chunk[0]) or len(chunk) * chunk[0].rows.size >= CHUNK):
            yield chunk
            chunk = []
        chunk.append(batch)
    if chunk:
        yield chunk


def _shape(batch: RolloutBatch) -> tuple[Any, ...]:
    return (*batch.rows.shape, batch.logged is None, batch.rewards.tasks is None)


def _join(batches: list[Rewards]) -> Rewards:
    """Batches as one, without steps: for statistics, and for estimators that look at one group at a time."""
    first = batches[0]
    return Rewards(
        values=torch.cat([rewards.values for rewards in batches]),
        weights=first.weights,
        names=first.names,
        lengths=_joined([rewards.lengths for rewards in batches], torch.cat),
        tasks=_joined([rewards.tasks for rewards in batches], _chained),
        prompts=_joined([rewards.prompts for rewards in batches], _chained),
    )


def _joined(parts: "list[Part | None]", join: Callable[[list[Part]], Part]) -> Part | None:
    """What all batches have, as one; None where one of them lacks it."""
    present = [part for part in parts if part is not None]
    return join(present) if len(present) == len(parts) else None


def _chained(parts: list[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(parts))


@dataclass(eq=False)
class _Pass:
    """One pass over a log: what is remembered between chunks."""

    rollouts: Rollouts
    recipes: dict[str, Recipe]
    wanted: Sequence[tuple[int, int]]
    examples: int
    refused: dict[str, str] = field(default_factory=dict)
    sampled: list[RolloutBatch] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    measured: list[Rewards] = field(default_factory=list)
    shown: list[tuple[float, int, ShownGroup]] = field(default_factory=list)
    # No two entries of the heap share a number, so groups are never compared. Among equals the first one is kept.
    order: Iterator[int] = field(default_factory=lambda: itertools.count(step=-1))
    steps: list[int] = field(default_factory=list)
    without_log: bool = False
    judged: bool = False

    def __post_init__(self) -> None:
        self.states: dict[str, State] = {name: {} for name in self.recipes}
        each = (*(recipe.estimator.normalizes_each for recipe in self.recipes.values()), False)
        self.statistics = Statistics(len(each), self.rollouts.names, each)
        self.stride = math.ceil(len(self.rollouts.paths) / SAMPLED)
        self.squares = torch.zeros(len(each)).double()

    def add(self, chunk: list[RolloutBatch]) -> None:
        """Replay the batches of a chunk."""
        batches = [batch.rewards for batch in chunk]
        joined = _join(batches)
        self.judged |= bool(joined.judged.any())
        rows = [self._advantages(name, batches, joined, chunk[0].step) for name in self.recipes]
        self.without_log |= chunk[0].logged is None
        logged = [torch.zeros_like(rows[0][0]) if b.logged is None else b.logged.nan_to_num() for b in chunk]
        advantages = torch.stack([*rows, torch.stack(logged)])  # (E, C, P, G)
        seen = self.statistics.batches
        apart = math.ceil(len(self.rollouts.paths) * chunk[0].rows.size / MEASURED)
        self.measured += [rewards for index, rewards in enumerate(batches, seen) if index % apart == 0]
        self.statistics.add(advantages, batches, joined)
        self._compare(advantages, joined)
        for index, batch in enumerate(chunk):
            if (seen + index) % self.stride == 0:
                self.sampled.append(batch)
                self.samples.append(advantages[:, index].flatten(1))
        self._show(chunk, advantages)
        self.steps = [*self.steps[:1], chunk[0].step, chunk[-1].step]

    def finish(self) -> Replay:
        """Put the results together."""
        if not self.steps:
            found = " ".join(f"{finding.first}." for finding in self.rollouts.findings.values())
            raise ValueError(f"Nothing of the log can be used. {found}")
        if not self.judged:
            raise ValueError(
                f"No completion of the log was judged: {' and '.join(map(repr, self.rollouts.names))} hold nothing but "
                f"NaN, from step {self.steps[0]} to step {self.steps[-1]}. Name other columns of rewards (--rewards)."
            )
        names = [*self.recipes, LOGGED]
        kept = [e for e, name in enumerate(names) if name not in self.refused]
        if self.without_log:
            kept.remove(len(names) - 1)
        live = [names[e] for e in kept if names[e] != LOGGED]
        if not live:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise ValueError(f"No estimator can be applied to these rewards. {reasons}")
        self._check_wanted()
        self.statistics.select(kept)
        comparable = not self.without_log and self.squares[-1].item() > 0
        relative = (self.squares / self.squares[-1]).sqrt()
        return Replay(
            rollouts=self.rollouts,
            names=[names[e] for e in kept],
            recipes=self.recipes,
            refused=self.refused,
            statistics=self.statistics,
            evidence=evidence_of(_join(self.measured)),
            difference={name: relative[names.index(name)].item() for name in live} if comparable else {},
            reactions=[reaction for name in live for reaction in self._reactions(name)],
            sample=torch.cat(self.samples, dim=1)[kept],
            groups=[self._texts(group, kept) for group in self._chosen()],
            steps=(self.steps[0], self.steps[-1]),
        )

    def _advantages(self, name: str, batches: list[Rewards], joined: Rewards, step: int) -> Tensor:
        """(C, P, G) advantages; zeros for an estimator that has refused some rewards of the run."""
        recipe, (prompts, generations) = self.recipes[name], batches[0].values.shape[:2]
        nothing = torch.zeros(len(batches), prompts, generations).double()
        if name in self.refused:
            return nothing
        estimator = recipe.estimator
        alone = not (estimator.stateful or estimator.needs_steps or recipe.modifiers)
        by_group = estimator.scope == "group" and alone
        try:
            if alone and not by_group and (at_once := self._at_once(name, batches, joined)) is not None:
                return at_once
            parts = [
                rewards.per_completion(self._estimate(name, rewards, self.states[name]))
                for rewards in ([joined] if by_group else batches)
            ]
        except ValueError as error:
            self.refused[name] = f"{error} (from step {step} on)"
            return nothing
        return torch.cat(parts).view_as(nothing)

    def _estimate(self, name: str, rewards: Rewards, state: State) -> Tensor:
        recipe = self.recipes[name]
        return estimate(recipe.estimator, rewards, recipe.keywords, modifiers=recipe.modifiers, state=state)

    def _at_once(self, name: str, batches: list[Rewards], joined: Rewards) -> Tensor | None:
        """What a loop over the batches gives, for all of them in one vectorized call; None where that cannot be.

        Of many small batches the calls cost more than the arithmetic. Only functions of this package are tried: what
        one of the user's does inside is not known.
        """
        recipe, first, lengths = self.recipes[name], batches[0], joined.lengths
        estimator = recipe.estimator
        ours = estimator.function.__module__.startswith("grpo_plus.")
        if not ours or lengths is None:
            return None

        def one(values: Tensor, lengths: Tensor) -> Tensor:
            return estimator.function(Rewards(values, first.weights, first.names, lengths), **recipe.keywords)

        values = joined.values.view(len(batches), *first.values.shape)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that torch turns into a loop
                advantages = torch.vmap(one)(values, lengths.view(values.shape[:3]))
        except RuntimeError:  # it looks at values, to refuse some
            return None
        return checked(f"advantage estimator {name!r}", advantages.flatten(0, 1), joined).view(advantages.shape)

    def _compare(self, advantages: Tensor, joined: Rewards) -> None:
        """Sum up the squared differences to the logged advantages, and these squared in the last place."""
        differs = has_spread(joined.total())
        groups = advantages.flatten(1, 2).where(differs, 0.0).flatten(1)
        self.squares[:-1] += (groups[:-1] - groups[-1]).square().sum(-1)
        self.squares[-1] += groups[-1].square().sum()

    def _show(self, chunk: list[RolloutBatch], advantages: Tensor) -> None:
        """Keep the groups asked for, or those with most disagreement, one of a batch at most."""
        scale = advantages.square().mean((2, 3), keepdim=True).sqrt()
        live = [e for e, name in enumerate(self.recipes) if name not in self.refused]
        if not live:
            return
        units = (advantages / scale.where(scale > 0, 1.0))[live]
        apart = units.std(dim=0, correction=0).mean(-1)  # (C, P)
        for index, batch in enumerate(chunk):
            numbers = [number for step, number in self.wanted if step == batch.step and number < len(batch.rows)]
            for number in numbers if self.wanted else [int(apart[index].argmax())]:
                self._keep(batch, number, advantages[:, index], apart[index, number].item())

    def _keep(self, batch: RolloutBatch, number: int, advantages: Tensor, score: float) -> None:
        """Put a group on the heap; where the heap is full, in place of the one with the least disagreement."""
        full = len(self.shown) >= (len(self.wanted) or self.examples)
        if full and score <= self.shown[0][0]:
            return
        entry = (score, next(self.order), _group(batch, number, advantages, score))
        if full:
            heapq.heapreplace(self.shown, entry)
        else:
            heapq.heappush(self.shown, entry)

    def _chosen(self) -> list[ShownGroup]:
        groups = [group for _, _, group in sorted(self.shown, reverse=True)]
        return sorted(groups, key=lambda g: self.wanted.index((g.step, g.group))) if self.wanted else groups

    def _check_wanted(self) -> None:
        found = {(group.step, group.group) for _, _, group in self.shown}
        for step, number in self.wanted:
            if (step, number) not in found:
                raise ValueError(
                    f"There is no group {number} at step {step}. The log has steps {self.steps[0]} to "
                    f"{self.steps[-1]}, and the groups of a batch count from 0."
                )

    def _texts(self, group: ShownGroup, kept: list[int]) -> ShownGroup:
        texts = self.rollouts.texts(group.path, group.rows)
        return replace(
            group,
            advantages=group.advantages[kept],
            prompt=texts[0][0],
            completions=tuple(completion for _, completion in texts),
        )

    def _reactions(self, name: str) -> list[Reaction]:
        """How the estimator reacts on the sampled batches; rewards that it then refuses are left out."""
        before = self._sampled_advantages(name, None)
        reactions = []
        for k, reward in enumerate(self.rollouts.names):
            try:
                after = self._sampled_advantages(name, k)
            except ValueError:
                continue
            size = (after.abs().sum() / before.abs().sum()).item() if before.any() else math.nan
            reactions.append(Reaction(name, reward, size, cosine(before, after)))
        return reactions

    def _sampled_advantages(self, name: str, rescaled: int | None) -> Tensor:
        """(n,) over the sampled batches, the reward of column `rescaled` multiplied."""
        state: State = {}
        parts = []
        for batch in self.sampled:
            rewards = batch.rewards
            if rescaled is not None:
                factors = torch.ones(len(rewards.names)).double()
                factors[rescaled] = FACTOR
                rewards = replace(rewards, values=rewards.values * factors)
            parts.append(rewards.per_completion(self._estimate(name, rewards, state)).flatten())
        return torch.cat(parts)


def _group(batch: RolloutBatch, number: int, advantages: Tensor, score: float) -> ShownGroup:
    rows: np.ndarray = batch.rows[number]
    values = batch.rewards.values[number]
    return ShownGroup(
        batch.path, batch.step, number, tuple(rows.tolist()), values, advantages[:, number].clone(), score
    )
