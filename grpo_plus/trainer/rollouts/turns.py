"""Turns of completions: where each one ends among the tokens, and the state that it starts from, as a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_plus.trainer.rollouts.digests import digest
from grpo_plus.trainer.rollouts.written import policy_runs

PROMPT = "prompt"  # the state of a first turn, where all completions of a group read the same prompt


@dataclass(frozen=True)
class Turns:
    """Turns of one completion, the runs of tokens that the policy wrote.

    Attributes:
        ends: index of each turn's last token in the completion.
        states: what each turn starts from.
    """

    ends: list[int]
    states: list[str]


def turns_of(ids: Sequence[int], mask: Sequence[int], completion: Any, *, start: str = PROMPT) -> Turns:
    """Turns of a completion. A state is what a tool or the environment wrote since the turn before.

    Args:
        ids: the completion's tokens, the policy's and the others'.
        mask: 0 at the tokens that a tool or the environment wrote.
        completion: a text or messages. Messages of tools may hold pictures, which the tokens do not tell apart.
        start: the state before the completion's first token.
    """
    ends: list[int] = []
    states: list[str] = []
    pictures = _pictures_before(completion)
    for turn, (first, length) in enumerate(policy_runs(mask)):
        told = ids[ends[-1] + 1 if ends else 0 : first]
        seen = pictures[turn] if turn < len(pictures) else []
        observed = [digest(part) for part in (list(told), seen) if part]
        states.append("".join(observed if ends else [start, *observed]))
        ends.append(first + length - 1)
    return Turns(ends, states)


def _pictures_before(completion: Any) -> list[list[Any]]:
    """The pictures in what tools said before each message of the policy."""
    before: list[list[Any]] = [[]]
    for message in completion if isinstance(completion, list) else []:
        if message["role"] == "assistant":
            before.append([])
        elif isinstance(message["content"], list):
            before[-1] += [part["image"] for part in message["content"] if part.get("type") == "image"]
    return before
