"""What the rewards of a log look like, whatever the estimator: the facts that speak for one and against another.

`evidence_of` measures them, and the rules (`rules.py`) read them. A share is a number from 0 to 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_plus.advantages.metrics import conflict, correlation
from grpo_plus.advantages.reductions import center, has_spread, mean, std, zscore
from grpo_plus.advantages.rewards import Rewards

NEAR_TIE = 0.1  # of the usual spread: a group that differs by less hardly differs
FAR_OUT = 10.0  # median absolute deviations between an outlier and the median
RESOLVED = 6  # decimal places in which two sums are the same value


@dataclass(frozen=True)
class RewardFacts:
    """One reward function of a weight other than 0.

    Attributes:
        flat: share of the groups in which all completions have the same reward.
        spread: mean std, times |weight|, over the groups in which the reward differs. 0 without such a group.
        low, high: least and greatest reward.
        level: the mean reward, as a share of the way from `low` to `high`. 1 where the two are equal.
    """

    name: str
    flat: float
    spread: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Evidence:
    """The rewards of P groups of G completions.

    A group is *live* if its weighted sums of rewards differ.

    Attributes:
        groups, size: P and G.
        rewards: the functions that count.
        low, high: least and greatest weighted sum.
        binary: whether the sums take two values only.
        level: the mean sum, as a share of the way from `low` to `high`.
        dead: share of groups whose sums do not differ.
        silent: share of groups in which no reward differs.
        hidden: share of groups whose sums do not differ, though they do if each reward is divided by its std first.
        failed: share of groups in which every completion has the lowest sum.
        conflict: share of completions that one reward puts above the group's mean and another one below.
        near_ties: share of live groups whose spread is below a tenth of the median of their task.
        outliers: share of live groups with a completion more than 10 median absolute deviations from the median.
        shift: by how many std a group's mean moves if each completion counts by its length, on average.
        length_correlation: of the centered sum and the length.
        spread_of_task: by task, the mean std of its live groups. Empty without tasks.
    """

    groups: int
    size: int
    rewards: tuple[RewardFacts, ...]
    low: float
    high: float
    binary: bool = False
    level: float = 0.5
    dead: float = 0.0
    silent: float = 0.0
    hidden: float = 0.0
    failed: float = 0.0
    conflict: float = 0.0
    near_ties: float = 0.0
    outliers: float = 0.0
    shift: float = 0.0
    length_correlation: float = 0.0
    spread_of_task: Mapping[str, float] = field(default_factory=dict)


def evidence_of(rewards: Rewards) -> Evidence:
    """Measure the rewards of all groups. Groups that nobody judged are left out of every share."""
    total = rewards.total()
    judged = rewards.judged.any(-1)
    live = has_spread(total).squeeze(-1)
    spread = std(total).squeeze(-1)
    low, high = _range(total)
    tasks = _by_task(rewards.tasks, live)
    values = total[rewards.judged]
    return Evidence(
        groups=int(judged.sum()),
        size=total.shape[1],
        rewards=_facts(rewards),
        low=low,
        high=high,
        binary=len(values.mul(10**RESOLVED).round().unique()) == 2,
        level=_level(values, low, high),
        dead=_share(~live, judged),
        silent=_share(~_differs(rewards), judged),
        hidden=_share(~live & has_spread(_normalized(rewards)).squeeze(-1), judged),
        failed=_share(~live & (total <= low).any(-1), judged) if high > low else 0.0,
        conflict=conflict(rewards),
        near_ties=_near_ties(spread, live, tasks),
        outliers=_share(_has_outlier(total), live),
        shift=_shift(rewards, spread, live),
        length_correlation=_length_correlation(rewards),
        spread_of_task={task: spread[its].mean().item() for task, its in tasks.items() if its.any()},
    )


def _facts(rewards: Rewards) -> tuple[RewardFacts, ...]:
    return tuple(
        _facts_of(name, rewards.values[..., k], abs(weight))
        for k, (name, weight) in enumerate(zip(rewards.names, rewards.weights.tolist(), strict=True))
        if weight != 0 and not rewards.values[..., k].isnan().all()
    )


def _facts_of(name: str, values: Tensor, weight: float) -> RewardFacts:
    judged, differs = ~values.isnan().all(-1), has_spread(values).squeeze(-1)
    low, high = _range(values)
    return RewardFacts(
        name=name,
        flat=_share(~differs, judged),
        spread=weight * std(values).squeeze(-1)[differs].mean().nan_to_num().item(),
        low=low,
        high=high,
        level=_level(values[~values.isnan()], low, high),
    )


def _differs(rewards: Rewards) -> Tensor:
    """(P,) whether some reward that counts differs in the group."""
    counting = rewards.values[..., rewards.weights != 0].transpose(1, 2)
    return has_spread(counting).any(1).squeeze(-1)


def _normalized(rewards: Rewards) -> Tensor:
    """(P, G) weighted sums of each reward's z-score in its group."""
    return rewards.weighted_sum(zscore(rewards.values.transpose(1, 2), eps=0.0).transpose(1, 2))


def _by_task(tasks: tuple[str, ...] | None, live: Tensor) -> dict[str, Tensor]:
    """For each task (P,), its live groups. Without tasks, nothing."""
    names = sorted(set(tasks or ()))
    return {name: live & torch.tensor([task == name for task in tasks or ()]) for name in names}


def _near_ties(spread: Tensor, live: Tensor, tasks: Mapping[str, Tensor]) -> float:
    near = torch.zeros_like(live)
    for groups in tasks.values() if tasks else [live]:
        if groups.any():
            near |= groups & (spread < NEAR_TIE * spread[groups].median())
    return _share(near, live)


def _has_outlier(total: Tensor) -> Tensor:
    """(P,) whether a completion is far from the others, in a group in which most differ."""
    distance = (total - total.nanmedian(-1, keepdim=True).values).abs()
    usual = distance.nanmedian(-1).values
    return (usual > 0) & (distance.nan_to_num().amax(-1) > FAR_OUT * usual)


def _shift(rewards: Rewards, spread: Tensor, live: Tensor) -> float:
    if rewards.lengths is None or not live.any():
        return 0.0
    total = rewards.total()
    moved = (mean(total, rewards.tokens() * rewards.judged) - mean(total)).squeeze(-1).abs()
    return (moved / spread)[live].mean().item()


def _length_correlation(rewards: Rewards) -> float:
    if rewards.lengths is None:
        return 0.0
    return correlation(center(rewards.total()), center(rewards.tokens()), rewards.judged)


def _range(values: Tensor) -> tuple[float, float]:
    judged = ~values.isnan()
    if not judged.any():
        return 0.0, 0.0
    return values[judged].min().item(), values[judged].max().item()


def _level(values: Tensor, low: float, high: float) -> float:
    return (values.mean().item() - low) / (high - low) if high > low else 1.0


def _share(found: Tensor, among: Tensor) -> float:
    return (found & among).sum().item() / max(int(among.sum()), 1)
