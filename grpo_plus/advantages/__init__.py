"""Rewards of a generation batch to advantages. Pure functions: no trainer, no tokenizer, no processes.

| file | the estimators of it | scale by |
|---|---|---|
| `group.py` | grpo, grpo_pop, loo_std, ngrpo | the group's std |
| `unnormalized.py` | dr_grpo, rloo, opo | nothing |
| `ranking.py` | rank, median_mad, quantile, best_minus_second | order and robust spread of the group |
| `binary.py` | maxrl, passk, pkpo, bnpo_advantage | the group's success rate |
| `batch.py` | batch_std, rloo_norm, gpg, reinforce_pp, reinforce_pp_baseline | a statistic of the batch |
| `multi_reward.py` | gdpo, mo_grpo, dvao, sa_mrpo | each reward function's own spread |

`modifiers.py` holds what composes with any of them, `process.py` advantages per token.

To add an estimator, write one function in the file of its family, register it with what it promises, and add a
hand-computed row to `tests/advantages/cases.py`; the property tests then run by themselves. In your own script,
without touching this package:

    from grpo_plus.advantages import Rewards, register

    @register("best_of_group")
    def best_of_group(rewards: Rewards) -> torch.Tensor:
        total = rewards.total()                                   # (P, G)
        return (total == total.amax(-1, keepdim=True)).double()

    GRPOPlusConfig(..., advantage_estimator="best_of_group")

or, without registering, `--advantage_estimator my_package.my_module.best_of_group`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_plus.advantages import batch, binary, group, multi_reward, ranking, unnormalized  # noqa: F401  (they register)
from grpo_plus.advantages.estimator import ESTIMATORS, Estimator, register
from grpo_plus.advantages.modifiers import (
    MODIFIERS,
    Modifiers,
    apply_to_advantages,
    apply_to_rewards,
    check_modifiers,
)
from grpo_plus.advantages.process import process_advantages
from grpo_plus.advantages.rewards import Rewards, UnknownRewardError, sample_rewards
from grpo_plus.registry import suggestion

__all__ = [
    "ESTIMATORS",
    "MODIFIERS",
    "Estimator",
    "Modifiers",
    "Rewards",
    "UnknownRewardError",
    "check_keywords",
    "check_modifiers",
    "estimate",
    "process_advantages",
    "register",
]


def estimate(
    estimator: Estimator | str,
    rewards: Rewards,
    keywords: Mapping[str, Any] | None = None,
    *,
    modifiers: Modifiers | None = None,
) -> Tensor:
    """Advantages of `rewards`, checked.

    Args:
        estimator: an entry of `ESTIMATORS`, its name, or a dotted path to a function.
        keywords: the estimator's hyper-parameters; its own defaults where absent.
        modifiers: entries of `MODIFIERS` and their keywords. Those of rewards run first, then the estimator, then
            those of advantages; among themselves in the order given.

    Returns:
        (P, G) float64, without gradient; 0 for a completion that no reward function judged.

    Raises:
        ValueError: a reward is infinite, or the result has another shape or is not finite where it should be.
    """
    if isinstance(estimator, str):
        estimator = ESTIMATORS[estimator]
    _check_rewards(rewards)
    rewards = apply_to_rewards(rewards, modifiers or {})
    advantages = estimator.function(rewards, **(keywords or {}))
    _check_shape(estimator.name, advantages, rewards)
    advantages = torch.where(rewards.judged, advantages.detach().cpu().double(), 0.0)
    _check_finite(estimator.name, advantages, rewards)
    return apply_to_advantages(rewards, advantages, modifiers or {})


def check_keywords(
    estimator: Estimator, keywords: Mapping[str, Any], *, num_generations: int = 2, names: Sequence[str] | None = None
) -> None:
    """Refuse hyper-parameters that cannot work before the run, by trying them on a small made-up batch.

    Args:
        num_generations: the run's own, in training or evaluation: k of `passk` must not exceed it.
        names: the run's reward functions. Where None, `bounds` of `sa_mrpo` may name anything.

    Raises:
        ValueError: an unknown keyword or a value out of range; UnknownRewardError, a subclass, for a reward's name.
    """
    for keyword in keywords:
        if keyword not in estimator.keywords:
            raise ValueError(
                f"The advantage estimator {estimator.name!r} takes no keyword {keyword!r}."
                f"{suggestion(keyword, estimator.keywords)}"
            )
    if not estimator.function.__module__.startswith("grpo_plus."):
        return  # a user's own function may need more than a made-up batch holds
    names = names or list(keywords.get("bounds") or {}) or ["sample"]
    try:
        # Rewards at the bounds that the keywords give: others would be refused for the wrong reason.
        sample = sample_rewards(num_generations, names, keywords.get("low", 0.0), keywords.get("high", 1.0))
        estimate(estimator, sample, keywords)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_rewards(rewards: Rewards) -> None:
    infinite = rewards.values.isinf()
    if infinite.any():
        prompt, completion, k = (int(index) for index in infinite.nonzero()[0])
        raise ValueError(
            f"The reward function {rewards.names[k]!r} returned {rewards.values[prompt, completion, k].item()} for "
            f"completion {completion} of group {prompt}. Return a finite number, or None where it cannot judge."
        )


def _check_shape(name: str, advantages: Any, rewards: Rewards) -> None:
    expected = tuple(rewards.values.shape[:2])
    found = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
    if found != expected:
        raise ValueError(
            f"The advantage estimator {name!r} returned {found} for rewards of {expected[0]} groups of {expected[1]} "
            f"completions; a tensor of shape {expected} is needed. {_describe_group(rewards, 0)}"
        )


def _check_finite(name: str, advantages: Tensor, rewards: Rewards) -> None:
    bad = ~advantages.isfinite()
    if bad.any():
        prompt, completion = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"The advantage estimator {name!r} returned {advantages[prompt, completion].item()} for completion "
            f"{completion} of group {prompt} ({int(bad.sum())} such values in the batch). Look for a division by zero "
            f"in it. {_describe_group(rewards, prompt)}"
        )


def _describe_group(rewards: Rewards, prompt: int) -> str:
    columns = (f"{name}: {rewards.values[prompt, :, k].tolist()}" for k, name in enumerate(rewards.names))
    return f"The rewards of group {prompt} were {'; '.join(columns)}."
