"""Sums over the batches of a run, for E estimators at once. The sums do not grow with the run.

Shape letters as everywhere, and E estimators, C batches of one chunk, B = P*G completions of a batch.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_plus.advantages.metrics import contributions
from grpo_plus.advantages.reductions import has_spread
from grpo_plus.advantages.rewards import Rewards

# Rounding in the last places would otherwise order completions that an estimator treats alike.
TIES = 1e-9


@dataclass(eq=False)
class Statistics:
    """What `add` has seen of `count` estimators; divide the sums by their counts with the methods.

    Attributes:
        completions, batches, groups: how many of each.
        flat: groups in which a reward, by name, gave every completion the same; "total" is the weighted sum.
        judged: groups in which it judged any.
    """

    count: int
    names: tuple[str, ...]
    normalizes_each: tuple[bool, ...]
    completions: int = 0
    batches: int = 0
    groups: int = 0
    flat: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    judged: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    size_of_task: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs, singles = (self.count, self.count), (self.count,)
        self._correlation, self._correlated = torch.zeros(pairs).double(), torch.zeros(pairs).double()
        self._opposed, self._live = torch.zeros(pairs).double(), torch.zeros(pairs).double()
        self._products = torch.zeros(pairs).double()
        self._dead, self._zero, self._effective, self._squares, self._size, self._live_batches = (
            torch.zeros(singles).double() for _ in range(6)
        )
        self._size_of_reward = torch.zeros(self.count, len(self.names)).double()

    def add(self, advantages: Tensor, batches: list[Rewards], joined: Rewards) -> None:
        """Count (E, C, P, G) advantages of C batches.

        Args:
            joined: the batches' rewards as one, (C*P, G, K).
        """
        estimators, chunk, prompts, generations = advantages.shape
        rows = advantages.flatten(2)  # (E, C, B)
        self.completions += rows[0].numel()
        self.batches += chunk
        self.groups += chunk * prompts
        self._add_pairs(rows.transpose(0, 1))
        size = rows.abs()
        sums, squares = size.sum(-1), size.square().sum(-1)
        self._effective += (sums.square() / squares.clamp(min=torch.finfo(squares.dtype).tiny)).sum(-1) / size.shape[-1]
        self._live_batches += (squares > 0).double().sum(-1)
        self._size += sums.sum(-1)
        self._squares += squares.sum(-1)
        self._zero += (rows == 0).double().sum((1, 2))
        self._dead += (advantages == 0).all(-1).double().sum((1, 2))
        self._add_spread(joined)
        self._add_rewards(advantages.abs().view(estimators, chunk * prompts, generations), joined)
        self._add_tasks(advantages.abs().sum(-1).flatten(1), joined.tasks)

    def select(self, kept: list[int]) -> None:
        """Forget all estimators but these."""
        self.count, self.normalizes_each = len(kept), tuple(self.normalizes_each[e] for e in kept)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                pairs = value.shape == (len(value),) * 2 and name != "_size_of_reward"
                setattr(self, name, value[kept][:, kept] if pairs else value[kept])
        self.size_of_task = {task: size[kept] for task, size in self.size_of_task.items()}

    def correlation(self) -> Tensor:
        """(E, E) mean Spearman correlation within a batch; NaN where no batch had one."""
        return self._correlation / self._correlated

    def flips(self) -> Tensor:
        """(E, E) share of the completions that train under both estimators which they push in opposite directions."""
        return self._opposed / self._live

    def products(self) -> Tensor:
        """(E, E) sums of the products of two estimators' advantages."""
        return self._products

    def dead(self) -> Tensor:
        """(E,) share of groups with advantages of 0 only."""
        return self._dead / self.groups

    def zero(self) -> Tensor:
        """(E,) share of completions with an advantage of 0."""
        return self._zero / self.completions

    def mean_size(self) -> Tensor:
        """(E,) mean |A|."""
        return self._size / self.completions

    def rms(self) -> Tensor:
        """(E,) root mean square of A."""
        return (self._squares / self.completions).sqrt()

    def effective(self) -> Tensor:
        """(E,) effective sample size as a share of the batch, the mean over the batches in which anything trains."""
        return self._effective / self._live_batches.clamp(min=1)

    def reward_share(self) -> Tensor:
        """(E, K) share of Σ|A| that each reward accounts for.

        A completion's |A| is split over the rewards in proportion to |cᵢₖ|, its weighted, centered rewards, which are
        divided by the reward's std in the group for an estimator that does so. What no reward explains, such as the
        push that some estimators give to groups without spread, is in no share: they sum to 1 at most.
        """
        return self._size_of_reward / self._size.unsqueeze(-1)

    def task_share(self) -> dict[str, Tensor]:
        """For each task (E,), its share of Σ|A|."""
        return {task: size / self._size for task, size in sorted(self.size_of_task.items())}

    def flat_share(self) -> dict[str, float]:
        """For each reward and "total", the share of groups that it does not tell apart, of those that it judged."""
        return {name: self.flat[name] / judged for name, judged in self.judged.items() if judged}

    def _add_pairs(self, rows: Tensor) -> None:
        """Products, correlations and flips of (C, E, B)."""
        self._products += torch.einsum("ceb,cfb->ef", rows, rows)
        completions = rows.shape[-1]
        ranks = average_ranks(rows)
        norm = ranks.norm(dim=-1)  # (C, E)
        valid = (norm > 0).double()
        unit = ranks / norm.where(norm > 0, 1.0).unsqueeze(-1)
        self._correlation += torch.einsum("ceb,cfb->ef", unit, unit) * completions
        self._correlated += torch.einsum("ce,cf->ef", valid, valid) * completions
        signs = rows.sign()
        live = torch.einsum("ceb,cfb->ef", signs.abs(), signs.abs())
        self._live += live
        self._opposed += (live - torch.einsum("ceb,cfb->ef", signs, signs)) / 2

    def _add_spread(self, joined: Rewards) -> None:
        columns = {name: joined.values[..., k] for k, name in enumerate(joined.names)} | {"total": joined.total()}
        for name, values in columns.items():
            judged = ~values.isnan().all(-1)
            self.judged[name] += int(judged.sum())
            self.flat[name] += int((judged & ~has_spread(values).squeeze(-1)).sum())

    def _add_rewards(self, size: Tensor, joined: Rewards) -> None:
        """|A| of (E, C*P, G), split over the rewards."""
        each = torch.tensor(self.normalizes_each)
        for normalized in set(self.normalizes_each):
            parts = contributions(joined, normalizes_each=normalized).abs().nan_to_num()
            whole = parts.sum(-1, keepdim=True)
            shares = torch.where(whole > 0, parts / whole.where(whole > 0, 1.0), 0.0)
            chosen = each == normalized
            self._size_of_reward[chosen] += size[chosen].flatten(1) @ shares.flatten(0, 1)

    def _add_tasks(self, size: Tensor, tasks: tuple[str, ...] | None) -> None:
        """|A| of (E, C*P) groups, by task."""
        if tasks is None:
            return
        names = sorted(set(tasks))
        index = torch.tensor([names.index(task) for task in tasks])
        sums = torch.zeros(len(size), len(names)).double().index_add_(1, index, size)
        for k, name in enumerate(names):
            self.size_of_task.setdefault(name, torch.zeros(len(size)).double()).add_(sums[:, k])


def average_ranks(values: Tensor) -> Tensor:
    """Ranks over the last axis less their mean, ties share the average: (..., n) -> (..., n)."""
    largest = values.abs().amax(-1, keepdim=True)
    rounded = (values / largest.where(largest > 0, 1.0) / TIES).round().contiguous()
    ordered = rounded.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, rounded)
    up_to = torch.searchsorted(ordered, rounded, right=True)
    return (below + up_to - values.shape[-1]).double() / 2
