"""Which settings choose the advantages, and what they exclude."""

from dataclasses import fields
from typing import TYPE_CHECKING

from trl import GRPOConfig

from grpo_plus.advantages import ESTIMATORS, check_keywords, check_modifiers
from grpo_plus.config.keywords import as_dictionary

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig


def check_advantages(config: "GRPOPlusConfig") -> None:
    """Refuse keywords without an estimator, an unknown estimator, and settings that it would override or not take."""
    if config.advantage_estimator is None:
        for name in ("advantage_kwargs", "advantage_modifiers"):
            if getattr(config, name):
                raise ValueError(
                    f"{name}={getattr(config, name)} has no estimator to go to. Set advantage_estimator too, such as "
                    "advantage_estimator='grpo'."
                )
        return
    _check_conflicts(config)
    _check_estimator(config)


def check_refills(config: "GRPOPlusConfig") -> None:
    """Refuse numbers that count no batches, and advantages or losses that groups of other batches would falsify."""
    asked = {name: getattr(config, name) for name in ("max_refills", "refill_buffer")}
    for name, value in asked.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r} is not a number of batches. Use 0 (off) or a small one such as 2.")
    if config.refill_buffer and (reason := _why_not_buffered(config)):
        raise ValueError(f"refill_buffer={config.refill_buffer} is not possible: {reason}, or set refill_buffer=0.")
    given = next((f"{name}={value}" for name, value in asked.items() if value), None)
    if given is None or config.advantage_estimator is not None:
        return
    for name, value, estimator in (
        ("scale_rewards", "batch", "batch_std"),
        ("multi_objective_aggregation", "normalize_then_sum", "gdpo"),
    ):
        if getattr(config, name) == value:
            raise ValueError(
                f"{given} replaces groups, but with {name}={value!r} TRL has scaled the others by them. "
                f"Drop {name} and set advantage_estimator={estimator!r}, the same formula on the batch that is "
                "trained on."
            )


def _why_not_buffered(config: "GRPOPlusConfig") -> str | None:
    """Reason why a group of an older policy cannot be trained on, and what to change. None where it can."""
    if config.loss_type == "reinforce":
        return "loss_type='reinforce' has no importance ratio to the policy that sampled. Take a loss that has"
    if config.sync_ref_model and config.beta != 0.0:
        return "the log-probabilities of the reference would be those of an older one. Set sync_ref_model=False"
    name = config.advantage_estimator
    if name is None and config.reward_weight_schedule:
        return (
            "reward_weight_schedule moves the weights, and TRL's advantages of a group of an earlier batch would be "
            "advantages of other reward weights. Set advantage_estimator='grpo', which estimates them anew"
        )
    if name is not None and ESTIMATORS[name].stateful:
        return f"advantage_estimator={name!r} remembers rewards, and would count a group twice. Take another"
    return None


def _check_conflicts(config: "GRPOPlusConfig") -> None:
    """Refuse a setting of TRL's that the estimator would override without a word."""
    defaults = {entry.name: entry.default for entry in fields(GRPOConfig)}
    for name in ("scale_rewards", "multi_objective_aggregation"):
        value = getattr(config, name)
        if value != defaults[name]:
            raise ValueError(
                f"advantage_estimator={config.advantage_estimator!r} replaces TRL's advantages, so {name}={value!r} "
                f"would have no effect. Drop one of the two ({name} defaults to {defaults[name]!r})."
            )


def _check_estimator(config: "GRPOPlusConfig") -> None:
    """Refuse keywords and modifiers that cannot work with the run's group sizes."""
    estimator = ESTIMATORS[str(config.advantage_estimator)]
    keywords = as_dictionary("advantage_kwargs", config.advantage_kwargs)
    try:
        for num_generations in {config.num_generations, config.num_generations_eval or config.num_generations}:
            check_keywords(estimator, keywords, num_generations=num_generations)
    except ValueError as error:
        raise ValueError(f"advantage_kwargs={keywords} does not fit {estimator.name!r}: {error}") from error
    modifiers = as_dictionary("advantage_modifiers", config.advantage_modifiers)
    try:
        check_modifiers(modifiers, num_generations=config.num_generations)
    except ValueError as error:
        raise ValueError(f"advantage_modifiers={modifiers} does not fit: {error}") from error
