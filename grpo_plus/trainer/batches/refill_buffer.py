"""Live groups of the last generation batches, which can take the place of dead ones later.

A group comes with the log-probabilities of the policy that sampled it, so that its ratio is that to the sampling policy
however old it is. TRL's removed replay buffer had none of them where a batch trains once: every old row then counted as
if the policy of the moment had sampled it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from grpo_plus.advantages import Rewards, Steps
from grpo_plus.trainer.batches.refill_rows import Padding, join_rewards, join_rows, rows_of
from grpo_plus.trainer.names import KEPT_LISTS, PADDING, REFILL_AGE

Rows = dict[str, Tensor]
Log = dict[tuple[str, ...], list[Any]]
# One number for each token of a completion. The lists of kept tokens are counted otherwise.
BY_TOKEN = {name for name, padding in PADDING.items() if padding is not None and padding.side == "right"} - {KEPT_LISTS}


@dataclass(frozen=True)
class Group:
    """The completions of one prompt.

    Attributes:
        born: number of the generation batch in which the group was sampled.
        trained: whether an update has seen the group.
        rows: its G rows in TRL's columns, on the host.
        rewards: of this group alone.
        log: its G rows in the columns of TRL's table of completions.
    """

    born: int
    trained: bool
    rows: Rows
    rewards: Rewards
    log: Log

    def state(self) -> dict[str, Any]:
        """The group as dictionaries, lists and tensors."""
        steps = self.rewards.steps
        rewards = vars(self.rewards) | {"steps": None if steps is None else vars(steps)}
        return vars(self) | {"rewards": rewards, "log": list(self.log.items())}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Group":
        """The group that `state` was asked for, even where a file has made lists of the tuples."""
        rewards = dict(state["rewards"])
        labels = {name: tuple(rewards[name]) for name in ("names", "tasks", "prompts") if rewards[name] is not None}
        steps = None if rewards["steps"] is None else Steps(**rewards["steps"])
        log = {tuple(name): column for name, column in state["log"]}
        return cls(**state | {"rewards": Rewards(**rewards | labels | {"steps": steps}), "log": log})


@dataclass(frozen=True)
class Held:
    """What the buffer holds between two generation batches.

    Attributes:
        batch: number of the last generation batch.
        groups: the live groups, in the order in which they were sampled.
    """

    batch: int = 0
    groups: tuple[Group, ...] = ()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"batch": self.batch, "groups": [group.state() for group in self.groups]}


@dataclass
class RefillBuffer:
    """The live groups of the last `batches` generation batches. Each is handed out once.

    Every process holds the groups of all processes: groups are small, and nothing has to be agreed on.
    """

    batches: int
    held: Held = field(default_factory=Held)

    def clear(self) -> None:
        """Forget all groups."""
        self.held = Held()

    def load(self, state: dict[str, Any] | None) -> None:
        """Take up what `Held.state` returned; None: nothing."""
        self.clear()
        if state is not None and self.batches:
            self.held = Held(state["batch"], tuple(map(Group.of_state, state["groups"])))

    def next_batch(self) -> None:
        """Begin a generation batch, and forget the groups that are too old for it."""
        batch = self.held.batch + 1
        self.held = Held(batch, tuple(group for group in self.held.groups if group.born >= batch - self.batches))

    def add(self, groups: Sequence[Group]) -> None:
        """Hold groups of this generation batch for the next ones."""
        self.held = replace(self.held, groups=self.held.groups + tuple(groups))

    def take(self, count: int, columns: Collection[str]) -> list[Group]:
        """Up to `count` groups of earlier batches that have these columns.

        Groups that no update has seen come first, and then the newest, whose ratios are nearest to 1.
        """
        held = self.held.groups
        fitting = [i for i, group in enumerate(held) if group.born < self.held.batch and group.rows.keys() == columns]
        fitting.sort(key=lambda i: (held[i].trained, -held[i].born))
        chosen = fitting[:count]
        self.held = replace(self.held, groups=tuple(held[i] for i in range(len(held)) if i not in chosen))
        return [self._aged(held[i]) for i in chosen]

    def _aged(self, group: Group) -> Group:
        age = torch.full_like(group.rows[REFILL_AGE], self.held.batch - group.born)
        return replace(group, rows=group.rows | {REFILL_AGE: age})


def split(rows: Rows, rewards: Rewards, log: Log, live: Tensor, trained: Tensor, born: int) -> list[Group]:
    """The live groups of a generation batch of all processes.

    Args:
        live: (P,) bool.
        trained: (P,) bool.
    """
    size = rewards.values.shape[1]
    numbers = live.nonzero().flatten()
    index = rows_of(numbers, size)
    host = {name: values[index.to(values.device)].cpu() for name, values in rows.items()}
    return [
        Group(
            born,
            bool(trained[number]),
            _trimmed({name: values[at * size : (at + 1) * size] for name, values in host.items()}),
            join_rewards(rewards, rewards, torch.tensor([number])),
            {name: column[number * size : (number + 1) * size] for name, column in log.items() if column},
        )
        for at, number in enumerate(numbers.tolist())
    ]


def joined(groups: Sequence[Group], padding: Mapping[str, Padding | None]) -> tuple[Rows, Rewards, Log]:
    """The groups as one batch: its rows filled up to one length, its rewards, its columns of the table.

    Args:
        padding: how each column is filled up.
    """

    def rows(name: str) -> Tensor:
        parts = (group.rows[name] for group in groups)
        return reduce(lambda old, new: join_rows(old, new, _all(old, new), padding[name]), parts)

    def column(name: tuple[str, ...]) -> list[Any]:
        nothing = [None] * groups[0].rewards.judged.numel()
        return [value for group in groups for value in group.log.get(name, nothing)]

    rewards = reduce(
        lambda old, new: join_rewards(old, new, _all(old.values, new.values)), (group.rewards for group in groups)
    )
    names = dict.fromkeys(name for group in groups for name in group.log)
    return {name: rows(name) for name in groups[0].rows}, rewards, {name: column(name) for name in names}


def _all(old: Tensor, new: Tensor) -> Tensor:
    return torch.arange(len(old) + len(new))


def _trimmed(rows: Rows) -> Rows:
    """Copies without the padding that all rows share."""
    prompt = rows["prompt_mask"].any(0).sum()
    used = rows["completion_mask"].any(0).nonzero()
    completion = int(used.max()) + 1 if len(used) else 1
    kept = {"prompt_ids": slice(-int(prompt), None), "prompt_mask": slice(-int(prompt), None)}
    kept |= dict.fromkeys(BY_TOKEN & rows.keys(), slice(completion))
    return {name: (values[:, kept[name]] if name in kept else values).clone() for name, values in rows.items()}
