"""The settings of evaluations: which tries pass@k counts, and by which reward."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grpo_plus.registry import suggestion

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig

METRIC = "pass@"


def check_pass_at_k(config: "GRPOPlusConfig") -> None:
    """Refuse a k that cannot be estimated, settings of a pass@k that is not asked for, and a metric that is not logged.

    One number in place of the list becomes a list.
    """
    if config.eval_pass_at_k is None:
        _check_unused(config)
    else:
        config.eval_pass_at_k = _tries(config.eval_pass_at_k, config.num_generations_eval or config.num_generations)
        _check_threshold(config.eval_pass_threshold)
    _check_best(config.metric_for_best_model, config.eval_pass_at_k or [])


def chosen_reward(given: str | None, names: Sequence[str], *, asking: str, setting: str) -> str:
    """The reward function that says which completions are right.

    Args:
        given: what the configuration says; None for the only one.
        names: the reward functions.
        asking: the setting that needs one, with its value.
        setting: where one is named.

    Raises:
        ValueError: none or several of them may be meant.
    """
    if given is None and len(names) > 1:
        raise ValueError(
            f"{asking} needs one reward function that says which completions are right, but there are "
            f"{', '.join(names)}. Set {setting}={names[0]!r}, or another of them."
        )
    name = names[0] if given is None else given
    if (found := list(names).count(name)) != 1:
        raise ValueError(
            f"{asking} needs one reward function, but {setting}={name!r} names {found}.{suggestion(name, names)}"
        )
    return name


def _check_unused(config: "GRPOPlusConfig") -> None:
    for name, default in (("eval_pass_reward", None), ("eval_pass_threshold", 1.0)):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no effect without eval_pass_at_k. Set eval_pass_at_k=[1, 4], or "
                f"drop {name}."
            )


def _tries(given: Any, generations: int) -> list[int]:
    tries = [given] if isinstance(given, int) else given
    whole = isinstance(tries, (list, tuple)) and all(type(k) is int and k >= 1 for k in tries)
    if not whole or not tries or len(set(tries)) < len(tries):
        raise ValueError(
            f"eval_pass_at_k={given!r} is not a list of different numbers of tries. Write eval_pass_at_k=[1, 4, 8]."
        )
    if max(tries) > generations:
        raise ValueError(
            f"eval_pass_at_k={given!r} takes {max(tries)} completions of each prompt, but an evaluation samples "
            f"{generations}. Set num_generations_eval={max(tries)}, and per_device_eval_batch_size to a multiple of it."
        )
    return list(tries)


def _check_threshold(threshold: Any) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise ValueError(f"eval_pass_threshold={threshold!r} must be a finite number, such as 1.0.")


def _check_best(metric: str | None, tries: Sequence[int]) -> None:
    """Refuse a best model by a pass@k that no evaluation logs. Transformers would say so after the first one."""
    found = re.search(rf"{METRIC}(\d+)$", metric or "")
    if found and int(found[1]) not in tries:
        raise ValueError(
            f"metric_for_best_model={metric!r} is not logged with eval_pass_at_k={list(tries) or None}. Set "
            f"eval_pass_at_k={[*tries, int(found[1])]}."
        )
