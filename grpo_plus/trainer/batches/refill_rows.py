"""Dynamic sampling as arithmetic on rows: dead groups of a batch, and the live groups that take their place.

TRL lays out a batch as P groups in order, each a block of G rows, and deals the rows to the processes in order.
Yu et al., "DAPO" (https://huggingface.co/papers/2503.14476), section 3.2.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo_plus.advantages import Rewards, Steps
from grpo_plus.advantages.reductions import has_spread


@dataclass(frozen=True)
class Padding:
    """Where rows of different lengths are filled up, and with what."""

    side: Literal["left", "right"]
    value: float


def without_spread(rewards: Rewards) -> Tensor:
    """(P,) bool: groups whose weighted sums differ by no more than rounding, and groups that nobody judged."""
    return ~has_spread(rewards.total()).squeeze(-1)


def draw_prompts(seed: str, size: int, prompts: int, refills: int) -> Iterator[list[int]]:
    """Indices into a dataset of `size` rows, `prompts` for each refill. No row comes twice before every row had a turn.

    The random generator is its own: the run's data order does not move, and a seed draws the same rows everywhere.
    """
    order = random.Random(seed).sample(range(size), min(size, prompts * refills))
    indices = cycle(order)
    for _ in range(refills):
        yield list(islice(indices, prompts))


def fill(dead: Tensor, live: Tensor) -> Tensor:
    """The group that each slot holds next.

    Slot i keeps its group, with index i, or takes new group j, with index P + j. Dead slots take the live new groups in
    order, as in DAPO's buffer.

    Args:
        dead: (P,) bool, of the groups that are there.
        live: (P,) bool, of the new groups.

    Returns:
        (P,) indices into the old groups followed by the new groups.
    """
    groups = torch.arange(len(dead))
    slots, new = dead.nonzero().flatten(), live.nonzero().flatten()
    filled = min(len(slots), len(new))
    groups[slots[:filled]] = len(dead) + new[:filled]
    return groups


def rows_of(groups: Tensor, num_generations: int) -> Tensor:
    """The rows of `groups`, in order: (P,) -> (P*G,)."""
    return (groups.unsqueeze(1) * num_generations + torch.arange(num_generations)).flatten()


def rows_of_process(rows: Tensor, process: int, local: int) -> Tensor:
    """One process's part of `rows`: (local,) indices into its own `local` rows followed by all new rows."""
    first = process * local
    mine = rows[first : first + local]
    # A row that stays, stays where it is: only new rows come from other processes.
    return torch.where(mine < len(rows), mine - first, mine - len(rows) + local)


def join_rewards(old: Rewards, new: Rewards, groups: Tensor) -> Rewards:
    """The rewards of `groups`, indices into the groups of `old` followed by those of `new`."""

    def labels(name: str) -> tuple[str, ...] | None:
        both = getattr(old, name), getattr(new, name)
        return None if None in both else tuple((*both[0], *both[1])[group] for group in groups.tolist())

    def numbers(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else torch.cat([first, second])[groups]

    # A batch in which no tool was called has one kind of length.
    some_called = old.full_lengths is not None or new.full_lengths is not None

    return replace(
        old,
        values=torch.cat([old.values, new.values])[groups],
        lengths=numbers(old.lengths, new.lengths),
        tasks=labels("tasks"),
        prompts=labels("prompts"),
        steps=_join_steps(old, new, groups),
        full_lengths=numbers(old.spans, new.spans) if some_called else None,
        kl_penalty=numbers(old.kl_penalty, new.kl_penalty),
    )


def join_rows(old: Tensor, new: Tensor, rows: Tensor, padding: Padding | None) -> Tensor:
    """Pick `rows` out of `old` followed by `new`, filled up to one length. `padding` None: a row is one number."""
    if padding is not None:
        length = max(old.shape[-1], new.shape[-1])
        old, new = _filled_up(old, length, padding), _filled_up(new, length, padding)
    return torch.cat([old, new])[rows.to(old.device)]


def join_column(old: Sequence[Any], new: Sequence[Any], rows: Tensor) -> list[Any]:
    """Pick `rows` out of a column of a table. None stands where a batch has no entry for a row."""
    both = [*_complete(old, len(rows)), *_complete(new, len(rows))]
    return [both[row] for row in rows.tolist()]


def _join_steps(old: Rewards, new: Rewards, groups: Tensor) -> Steps | None:
    if old.steps is None and new.steps is None:
        return None
    first, second = (rewards.steps or _no_steps(rewards) for rewards in (old, new))
    joined = Steps(
        join_rows(first.rewards, second.rewards, groups, Padding("right", torch.nan)),
        join_rows(first.ends, second.ends, groups, Padding("right", -1)),
    )
    # An estimator compares states of one group only: numbers of two batches may be the same.
    if first.states is None or second.states is None or first.at_end is None or second.at_end is None:
        return joined
    states = join_rows(first.states, second.states, groups, Padding("right", -1))
    return replace(joined, states=states, at_end=join_rows(first.at_end, second.at_end, groups, None))


def _no_steps(rewards: Rewards) -> Steps:
    rows = [None] * rewards.judged.numel()
    return Steps.from_rows(rows, rows, lengths=rewards.judged)


def _filled_up(values: Tensor, length: int, padding: Padding) -> Tensor:
    missing = length - values.shape[-1]
    return pad(values, (missing, 0) if padding.side == "left" else (0, missing), value=padding.value)


def _complete(column: Sequence[Any], rows: int) -> list[Any]:
    return [*column, *[None] * rows][:rows]
