"""Where the KL to the reference goes: into the loss, as in GRPO, or into the reward, as in RLOO."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from grpo_plus.advantages import ESTIMATORS, Estimator, estimate
from grpo_plus.advantages.rewards import sample_rewards

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig

IN_REWARD = "kl_in_reward"
GIVEN = f"advantage_modifiers={{{IN_REWARD!r}: {{}}}}"


def in_reward(config: "GRPOPlusConfig") -> bool:
    """Whether `beta` weighs a KL in the reward, and none in the loss."""
    return IN_REWARD in (config.advantage_modifiers or {})


def beta_of_loss(config: "GRPOPlusConfig") -> float:
    """Weight of the KL term in the loss."""
    return 0.0 if in_reward(config) else config.beta


def check_kl_in_reward(config: "GRPOPlusConfig") -> None:
    """Refuse a KL in the reward that has no weight or would not be subtracted, and warn where it counts too much."""
    if not in_reward(config):
        return
    if config.beta == 0:
        raise ValueError(f"{GIVEN} takes beta times the KL from the rewards, but beta=0. Set beta, such as 0.05.")
    if config.demonstration_column is not None:
        raise ValueError(
            f"{GIVEN} estimates the KL from what the policy drew, and demonstration_column="
            f"{config.demonstration_column!r} brings completions that it did not. Drop one of the two; without the "
            "modifier beta weighs a KL in the loss."
        )
    estimator = ESTIMATORS[str(config.advantage_estimator)]
    modifiers = config.advantage_modifiers
    assert isinstance(modifiers, dict)
    if "difficulty" in modifiers and modifiers["difficulty"].get("by") is None:
        raise ValueError(
            f"{GIVEN}: the modifier 'difficulty' would look for successes in rewards less the KL. Give it by=, the "
            "reward that says what a success is."
        )
    if (reason := _why_not(config, estimator)) is not None:
        raise ValueError(f"{GIVEN} does not go with advantage_estimator={estimator.name!r}: {reason}.")
    if estimator.scope == "group" and estimator.scale_invariant and "filter_zero_std" not in modifiers:
        warnings.warn(
            f"{GIVEN} with advantage_estimator={estimator.name!r}: a group whose rewards agree differs in the KL "
            "alone, and the division by its spread makes full-size advantages of that. Take 'rloo' or 'dr_grpo', or "
            "add the modifier 'filter_zero_std'.",
            stacklevel=4,  # the line that makes the configuration
        )
    elif (config.max_refills or config.refill_buffer) and "filter_zero_std" not in modifiers:
        warnings.warn(
            f"{GIVEN}: completions of a group differ in the KL, so hardly any group is dead, and max_refills="
            f"{config.max_refills}, refill_buffer={config.refill_buffer} replace none. Add the modifier "
            "'filter_zero_std', by the reward in which a group has to differ.",
            stacklevel=4,
        )


def _why_not(config: "GRPOPlusConfig", estimator: Estimator) -> str | None:
    """Why the estimator would not see rewards less the KL. None where it does."""
    if estimator.multi_reward:
        return "it looks at each reward by itself, and would not subtract the KL from the others"
    if not estimator.function.__module__.startswith("grpo_plus."):
        return None
    # Rewards of 0 and 1 less penalties of both signs: what wants 0 and 1, or no negative rewards, refuses them.
    sample = sample_rewards(config.num_generations)
    penalty = torch.linspace(0.5, -0.5, sample.judged.numel(), dtype=torch.float64).view_as(sample.judged)
    sample = replace(sample, kl_penalty=penalty)
    try:
        estimate(estimator, sample, config.advantage_kwargs, modifiers={IN_REWARD: {}})  # type: ignore[arg-type]
    except ValueError:
        return "it wants rewards within bounds, and a reward less the KL has none. Take 'rloo' or 'dr_grpo'"
    return None
