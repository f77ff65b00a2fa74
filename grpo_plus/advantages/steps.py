"""Rewards of a completion's steps, as a reward function reports them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Row = Sequence[float] | Tensor | None


@dataclass(frozen=True)
class Steps:
    """Steps of the completions of one generation batch, grouped by prompt. J is the largest number of steps.

    Attributes:
        rewards: (P, G, J) float64. NaN where a completion has fewer steps.
        ends: (P, G, J) index of each step's last token in the completion, from 0. -1 where there is no step.
    """

    rewards: Tensor
    ends: Tensor

    @classmethod
    def from_rows(cls, rewards: Sequence[Row], ends: Sequence[Row], *, lengths: Tensor) -> "Steps":
        """Pad the steps that a reward function gave for each completion, in the order of the reward table.

        Args:
            rewards: one list of rewards per completion. None or an empty list for a completion without steps.
            ends: one list of token indices per completion.
            lengths: (P, G) completion lengths in tokens.

        Raises:
            ValueError: a completion has more or fewer rewards than ends, an infinite reward, or a step that ends
                outside the completion.
        """
        columns = [
            (_as_row("step_rewards", row, values), _as_row("step_ends", row, indices))
            for row, (values, indices) in enumerate(zip(rewards, ends, strict=True))
        ]
        for row, (values, indices) in enumerate(columns):
            _check_row(row, values, indices, int(lengths.flatten()[row]))
        return cls(
            _padded([values for values, _ in columns], torch.nan).view(*lengths.shape, -1),
            _padded([indices for _, indices in columns], -1.0).view(*lengths.shape, -1).long(),
        )


def _as_row(column: str, row: int, given: Row) -> Tensor:
    try:
        return torch.as_tensor([] if given is None else given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Completion {row} has {column} {given!r}. Give a list of numbers.") from error


def _padded(rows: list[Tensor], value: float) -> Tensor:
    """Rows of one length, (B, J), J at least 1."""
    padded = torch.full((len(rows), max(1, *map(len, rows))), value, dtype=torch.float64)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return padded


def _check_row(row: int, rewards: Tensor, ends: Tensor, length: int) -> None:
    if rewards.dim() != 1 or rewards.shape != ends.shape:
        raise ValueError(
            f"Completion {row} has step_rewards {rewards.tolist()} and step_ends {ends.tolist()}. Give one list of "
            "rewards and one list of as many token indices for each completion."
        )
    if not rewards.isfinite().all():
        raise ValueError(f"Completion {row} has step_rewards {rewards.tolist()}. Use finite numbers.")
    outside = (ends < 0) | (ends >= length) | (ends != ends.floor())
    if outside.any():
        raise ValueError(
            f"Completion {row} has {length} tokens and step_ends {ends.tolist()}. A step's end is the index of its "
            "last token in completion_ids, counted from 0."
        )
