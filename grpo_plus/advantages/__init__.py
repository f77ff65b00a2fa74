"""Rewards of a generation batch to advantages. Pure functions: no trainer, no tokenizer, no processes.

| file | the estimators of it | scale by |
|---|---|---|
| `group.py` | grpo, grpo_pop, loo_std, ngrpo | the group's std |
| `unnormalized.py` | dr_grpo, rloo, opo | nothing |
| `ranking.py` | rank, median_mad, quantile, best_minus_second | order and robust spread of the group |
| `binary.py` | maxrl, passk, pkpo, bnpo_advantage | the group's success rate |
| `batch.py` | batch_std, rloo_norm, gpg, reinforce_pp, reinforce_pp_baseline | a statistic of the batch |
| `multi_reward.py` | gdpo, mo_grpo, dvao, sa_mrpo | each reward function's own spread |
| `process.py` | process, one advantage per token from rewards per step | the group's std over all steps |

`modifiers.py` holds what composes with any of them.

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

from collections.abc import Mapping
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
    unnormalized,
)
from grpo_plus.advantages.checks import check_keywords, check_rewards, check_state, checked
from grpo_plus.advantages.estimator import ESTIMATORS, Estimator, State, register
from grpo_plus.advantages.modifiers import (
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
    "check_state",
    "checked",
    "clip_limits",
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
    state: State | None = None,
) -> Tensor:
    """Advantages of `rewards`, checked.

    Args:
        estimator: an entry of `ESTIMATORS`, its name, or a dotted path to a function.
        keywords: the estimator's hyper-parameters; its own defaults where absent.
        modifiers: entries of `MODIFIERS` and their keywords. Those of rewards run first, then the estimator, then
            those of advantages; among themselves in the order given.

        state: what a stateful estimator remembers; updated in place. None: nothing is remembered.

    Returns:
        (P, G) float64, or (P, G, T) for one per token, without gradient; 0 for a completion that no reward function
        judged, and past the end of one.

    Raises:
        ValueError: a reward is infinite, or the result has another shape or is not finite where it should be.
    """
    if isinstance(estimator, str):
        estimator = ESTIMATORS[estimator]
    check_rewards(rewards)
    rewards = apply_to_rewards(rewards, modifiers or {})
    advantages = estimator(rewards, keywords or {}, {} if state is None else state)
    advantages = checked(f"advantage estimator {estimator.name!r}", advantages, rewards)
    return apply_to_advantages(rewards, advantages, modifiers or {})
