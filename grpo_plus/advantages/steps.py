"""Rewards of a completion's steps, as a reward function reports them, and the states that the steps start from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Row = Sequence[float] | Tensor | None
States = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Steps:
    """Steps of the completions of one generation batch, grouped by prompt. J is the largest number of steps.

    Attributes:
        rewards: (P, G, J) float64. NaN where a completion has fewer steps.
        ends: (P, G, J) index of each step's last token in the completion, from 0. -1 where there is no step.
        states: (P, G, J) number of the state that each step starts from. Within a group, equal numbers are equal
            states. -1 where there is no step. None where nobody asked for states.
        at_end: (P, G) whether the completion's own reward falls on its last step, as nobody gave rewards of its steps.
            None without states.
    """

    rewards: Tensor
    ends: Tensor
    states: Tensor | None = None
    at_end: Tensor | None = None

    @classmethod
    def from_rows(
        cls, rewards: Sequence[Row], ends: Sequence[Row], states: States | None = None, *, lengths: Tensor
    ) -> "Steps":
        """Pad the steps of each completion, in the order of the reward table.

        Args:
            rewards: one list of rewards per completion. None or an empty list for a completion without steps. With
                `states`, None leaves the completion's own reward to its last step.
            ends: one list of token indices per completion.
            states: one list per completion, of the states that its steps start from.
            lengths: (P, G) completion lengths in tokens.

        Raises:
            ValueError: a completion has more or fewer rewards or states than ends, an infinite reward, or a step that
                ends outside the completion. With states: the ends do not rise.
        """
        indices = [_as_row("step_ends", row, given) for row, given in enumerate(ends)]
        outcomes = [states is not None and given is None for given in rewards]
        values = [
            torch.zeros_like(its_ends) if outcome else _as_row("step_rewards", row, given)
            for row, (given, its_ends, outcome) in enumerate(zip(rewards, indices, outcomes, strict=True))
        ]
        for row, (its_rewards, its_ends) in enumerate(zip(values, indices, strict=True)):
            if states is not None:
                _check_turns(row, its_rewards, its_ends, states[row])
            _check_row(row, its_rewards, its_ends, int(lengths.flatten()[row]))
        return cls(
            _padded(values, torch.nan).view(*lengths.shape, -1),
            _padded(indices, -1.0).view(*lengths.shape, -1).long(),
            None if states is None else _padded(_numbered(states), -1.0).view(*lengths.shape, -1).long(),
            None if states is None else torch.tensor(outcomes).view(lengths.shape),
        )

    def scored(self, total: Tensor) -> Tensor:
        """Rewards of the steps of judged completions, (P, G, J). NaN elsewhere.

        Args:
            total: (P, G) rewards of the completions, which fall on the last step where `at_end` says so.
        """
        rewards = self.rewards.masked_fill(total.isnan().unsqueeze(-1), torch.nan)
        if self.at_end is None:
            return rewards
        last = (self.ends >= 0).sum(-1, keepdim=True) - 1
        outcome = torch.zeros_like(rewards).scatter(-1, last.clamp(min=0), total.unsqueeze(-1).nan_to_num())
        return rewards + outcome * self.at_end.unsqueeze(-1)

    def by_state(self, judged: Tensor) -> tuple[Tensor, Tensor]:
        """The steps of judged completions: a number per group and state, (n,), and where these steps are, (P, G, J).

        Args:
            judged: (P, G) bool.

        Raises:
            ValueError: the steps come without states.
        """
        if self.states is None:
            raise ValueError("These steps come without the states that they start from.")
        taken = (self.states >= 0) & judged.unsqueeze(-1)
        first = torch.arange(len(self.states)).view(-1, 1, 1) * (self.states.max() + 1)
        return (self.states + first)[taken], taken


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


def _numbered(states: States) -> list[Tensor]:
    """Numbers in place of the states: equal states have equal numbers."""
    numbers: dict[str, int] = {}
    return [torch.tensor([numbers.setdefault(state, len(numbers)) for state in row]).double() for row in states]


def _check_turns(row: int, rewards: Tensor, ends: Tensor, states: Sequence[str]) -> None:
    found = [int(end) if end.is_integer() else end for end in ends.flatten().tolist()]
    if rewards.shape != ends.shape or len(states) != len(found):
        raise ValueError(
            f"Completion {row} has {len(found)} turns, with the ends {found}, but {rewards.numel()} step_rewards and "
            f"{len(states)} step_states. Give one of each per turn. Without step_ends, a turn is a run of tokens that "
            "the policy wrote: an assistant's message of a tool loop, a run of ones in env_mask."
        )
    if not (ends.flatten().diff() > 0).all():
        raise ValueError(f"Completion {row} has step_ends {found}. Give the ends of turns in rising order.")


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
