"""Which kinds of reward functions there are, and what they may return: one number or None for each completion."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch


class WrongRewardsError(Exception):
    """What a reward function returned is no list of rewards."""


def is_async(function: Any) -> bool:
    """Whether TRL awaits what the function returns."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def called(name: str, function: Any, columns: dict[str, Any], rows: int) -> list[Any]:
    """The rewards that a function returns for a number of rows."""
    return as_rewards(name, function(**columns), rows)


async def awaited(name: str, function: Any, columns: dict[str, Any], rows: int) -> list[Any]:
    """The rewards that a coroutine function returns for a number of rows."""
    return as_rewards(name, await function(**columns), rows)


def as_rewards(name: str, returned: Any, rows: int) -> list[Any]:
    """The rewards as a list of numbers and None.

    Raises:
        WrongRewardsError: it is anything else.
    """
    source = f"The reward function {name!r} returned"
    wanted = f"Return a list of one number per completion, {rows} here, with None where it cannot judge."
    if isinstance(returned, (str, bytes, Mapping, set, frozenset)) or not _iterable(returned):
        raise WrongRewardsError(f"{source} {_short(returned)}. {wanted}")
    rewards = list(returned)
    if len(rewards) != rows:
        raise WrongRewardsError(f"{source} {len(rewards)} rewards for {rows} completions. {wanted}")
    for completion, reward in enumerate(rewards):
        if reward is not None and (reason := _why_no_number(reward)):
            raise WrongRewardsError(f"{source} {_short(reward)} for completion {completion}, {reason}. {wanted}")
    return [reward if isinstance(reward, _TAKEN) else float(reward) for reward in rewards]


# What TRL turns into float32 by itself. Others, such as a Fraction, become a float first.
_TAKEN = (type(None), bool, int, float, torch.Tensor)


def _why_no_number(reward: Any) -> str | None:
    if isinstance(reward, (str, bytes)):
        return "which is text"
    if getattr(reward, "ndim", 0) or isinstance(reward, (list, tuple)):
        return "which is a list of its own"
    try:
        float(reward)
    except OverflowError:
        return "which is too large for a float"
    except (TypeError, ValueError, RuntimeError):
        return f"which is a {type(reward).__name__} and no number"
    return None


def _iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # a tensor without dimensions has __iter__ and raises too
        return False
    return True


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"
