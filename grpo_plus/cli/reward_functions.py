"""Reward functions by name: TRL's, ours, and the user's by dotted paths, with their keywords."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_plus import rewards as ours
from grpo_plus.registry import import_function, suggestion

# TRL's functions, and its makers of functions with the keywords that `trl grpo` gives them.
TRLS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
MAKERS: dict[str, dict[str, Any]] = {
    "get_soft_overlong_punishment": {"max_completion_len": 1280, "soft_punish_cache": 256},
    "get_repetition_penalty_reward": {},
    "get_cosine_scaled_reward": {},
}
REWARD_NAMES = (*TRLS, *MAKERS, *ours.__all__)


def check_keywords(keywords: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse `reward_kwargs` about a function that is not in use, or that are no table of tables."""
    for name, given in keywords.items():
        if name not in names:
            raise ValueError(f"reward_kwargs is about {name!r}, which is not in use. In use: {', '.join(names)}.")
        if not isinstance(given, dict):
            raise ValueError(f"""reward_kwargs takes a table by function: '{{"{name}": {{"keyword": 1}}}}'.""")


def named_rewards(names: Sequence[str], keywords: Mapping[str, Mapping[str, Any]]) -> list[Callable[..., Any]]:
    """The functions of these names.

    Args:
        keywords: hyper-parameters by the name of the function.

    Raises:
        UnknownNameError: there is no function of a name.
        ValueError: a function does not have a keyword, or lacks one that it needs.
    """
    return [_reward(name, keywords.get(name, {})) for name in names]


def own_keywords(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The hyper-parameters of a function with their defaults: what TRL does not pass. ... is the default of none."""
    from grpo_plus.config.data import ALWAYS

    maker = name in MAKERS
    keywords = {
        key: ... if one.default is one.empty else one.default
        for key, one in inspect.signature(function).parameters.items()
        if one.kind != one.VAR_KEYWORD and key not in ALWAYS and (maker or one.default is not one.empty)
    }
    return keywords | MAKERS.get(name, {})


def _reward(name: str, given: Mapping[str, Any]) -> Callable[..., Any]:
    function = named_function(name)
    keywords = own_keywords(name, function)
    for key in given:
        if key not in keywords:
            raise ValueError(f"reward_kwargs: {name!r} has no keyword {key!r}.{suggestion(key, keywords)}")
    if name not in MAKERS:
        return functools.partial(function, **given) if given else function
    keywords |= given
    for key, value in keywords.items():
        if value is ...:
            raise ValueError(f"""{name} needs {key}. Write --reward_kwargs '{{"{name}": {{"{key}": 512}}}}'.""")
    return function(**keywords)


def named_function(name: str) -> Callable[..., Any]:
    """The function, or its maker, without keywords."""
    from trl import rewards

    if name in ours.__all__:
        return getattr(ours, name)
    if name in REWARD_NAMES:
        return getattr(rewards, name)
    return import_function("reward function", name, REWARD_NAMES)
