"""Turn the rewards of a generation batch into advantages. Pure functions: no trainer, no tokenizer, no processes.

To find an estimator, run `grpo-plus ls advantages`, or look in `ESTIMATORS`. Each file holds one family, and its first
lines say how to choose within the family. `modifiers.py` holds what composes with any estimator.

To add an estimator, write one function in the file of its family, register the function with its promises (see
`Estimator`), and add a hand-computed row to `tests/advantages/cases.py`. The property tests then run by themselves.

An estimator of your own leaves this package as it is:

    from grpo_plus.advantages import Rewards, register

    @register("best_of_group")
    def best_of_group(rewards: Rewards) -> torch.Tensor:
        total = rewards.total()                                   # (P, G)
        return (total == total.amax(-1, keepdim=True)).double()

    GRPOPlusConfig(..., advantage_estimator="best_of_group")

A dotted path needs no registration: `--advantage_estimator my_package.my_module.best_of_group`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from grpo_plus.advantages import (  # noqa: F401  (they register themselves)
    batch,
    binary,
    group,
    multi_reward,
    process,
    ranking,
    running,
    turns,
    unnormalized,
)
from grpo_plus.advantages.checks import (
    check_keywords,
    check_rewards,
    check_state,
    check_trls_range,
    check_weights,
    checked,
)
from grpo_plus.advantages.estimator import ESTIMATORS, Estimator, State, register
from grpo_plus.advantages.modifiers import (
    LENGTH_MODIFIERS,
    MODIFIERS,
    Modifiers,
    apply_to_advantages,
    apply_to_rewards,
    check_modifiers,
    clip_limits,
)
from grpo_plus.advantages.process import process_advantages
from grpo_plus.advantages.rewards import Rewards, UnknownRewardError
from grpo_plus.advantages.steps import Steps

__all__ = [
    "ESTIMATORS",
    "LENGTH_MODIFIERS",
    "MODIFIERS",
    "Estimator",
    "Modifiers",
    "Rewards",
    "State",
    "Steps",
    "UnknownRewardError",
    "apply_to_rewards",
    "check_keywords",
    "check_modifiers",
    "check_rewards",
    "check_state",
    "check_trls_range",
    "check_weights",
    "checked",
    "clip_limits",
    "estimate",
    "process_advantages",
    "register",
]


def estimate(
    estimator: Estimator | str | Callable[..., Tensor],
    rewards: Rewards,
    keywords: Mapping[str, Any] | None = None,
    *,
    modifiers: Modifiers | None = None,
    state: State | None = None,
) -> Tensor:
    """Compute the advantages of a batch, and check them.

    Args:
        estimator: an entry of `ESTIMATORS`, its name, a dotted path to a function, or a function.
        keywords: hyper-parameters of the estimator. Absent ones keep the estimator's defaults.
        modifiers: names of `MODIFIERS` and their keywords. Reward modifiers run before the estimator and advantage
            modifiers after it, each kind in the order given.
        state: what a stateful estimator remembers; updated in place. With None nothing is remembered.

    Returns:
        (P, G) float64 without gradient, or (P, G, T) for an advantage per token. A completion that no reward function
        judged gets 0, and so do the places past the end of a completion.

    Raises:
        ValueError: a reward is infinite, or the result has another shape or is not finite where it should be.
    """
    if not isinstance(estimator, Estimator):
        estimator = ESTIMATORS[estimator]
    check_rewards(rewards)
    rewards = apply_to_rewards(rewards, modifiers or {})
    advantages = estimator(rewards, keywords or {}, {} if state is None else state)
    advantages = checked(f"advantage estimator {estimator.name!r}", advantages, rewards)
    return apply_to_advantages(rewards, advantages, modifiers or {})
