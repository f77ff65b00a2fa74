"""Which settings a loss reads: TRL's fields for TRL's losses, `loss_kwargs` for the ones that TRL lacks."""

import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from grpo_plus.config.keywords import as_dictionary
from grpo_plus.config.kl import beta_of_loss, in_reward
from grpo_plus.losses import KL_ESTIMATORS, LOSSES, REDUCTIONS, TRL_LOSSES, AdaptiveBeta, check_loss_keywords
from grpo_plus.registry import suggestion

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig

# Read by TRL's losses only. A loss of ours takes its hyper-parameters from loss_kwargs and has no part of the rest.
TRL_ONLY = (
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
)
OURS_ONLY: dict[str, Any] = {"loss_kwargs": {}, "loss_reduction": None, "kl_estimator": "k3"}


def check_loss(config: "GRPOPlusConfig") -> None:
    """Refuse an unknown loss, and every setting that the chosen loss would not read."""
    _warn_of_traps(config)
    if config.loss_type in TRL_LOSSES:
        _refuse(config, OURS_ONLY, "is read by the losses that TRL lacks only; this one has fields of its own in TRL")
        return
    loss = LOSSES[config.loss_type]
    defaults = {entry.name: entry.default for entry in fields(GRPOConfig)}
    read_by_trl = {name: defaults[name] for name in TRL_ONLY if name in defaults}
    hint = f"loss_kwargs takes {', '.join(loss.keywords) or 'nothing'}"
    _refuse(config, read_by_trl, f"is read by TRL's losses only and would have no effect; {hint}")
    if config.loss_reduction is not None and config.loss_reduction not in REDUCTIONS:
        raise ValueError(
            f"Unknown loss_reduction {config.loss_reduction!r}.{suggestion(config.loss_reduction, REDUCTIONS)}"
        )
    if config.kl_estimator not in KL_ESTIMATORS:
        raise ValueError(
            f"Unknown kl_estimator {config.kl_estimator!r}.{suggestion(config.kl_estimator, KL_ESTIMATORS)}"
        )
    _check_kl_estimator(config)
    check_loss_keywords(loss, as_dictionary("loss_kwargs", config.loss_kwargs))


def check_kl_target(config: "GRPOPlusConfig") -> None:
    """Refuse a target that beta cannot move towards, and a horizon without a target."""
    if config.kl_target is not None:
        if config.beta == 0:
            raise ValueError(f"kl_target={config.kl_target} moves beta, which is 0. Set beta to where it should start.")
        AdaptiveBeta(config.beta, config.kl_target, config.kl_horizon)
    elif config.kl_horizon != type(config).kl_horizon:
        raise ValueError(f"kl_horizon={config.kl_horizon} has no effect without kl_target. Set kl_target too.")


def _check_kl_estimator(config: "GRPOPlusConfig") -> None:
    """Refuse a KL estimator without effect or with a gradient of 0, and warn of k2 times the ratio."""
    given = f"kl_estimator={config.kl_estimator!r}"
    if beta_of_loss(config) == 0 and config.kl_estimator != OURS_ONLY["kl_estimator"]:
        where = "a KL in the reward, which is k1" if in_reward(config) else "beta=0"
        raise ValueError(f"{given} has no effect with {where}. Set beta for a KL in the loss, or drop kl_estimator.")
    if config.kl_estimator == "k1" and not config.use_bias_correction_kl:
        raise ValueError(
            f"{given} with use_bias_correction_kl=False has a gradient of 0 on average, whatever beta is. Set "
            "use_bias_correction_kl=True, or take kl_estimator='k2' or 'k3'."
        )
    if config.beta != 0 and config.kl_estimator == "k2" and config.use_bias_correction_kl:
        warnings.warn(
            f"{given} has the KL's gradient by itself; use_bias_correction_kl=True multiplies it by the ratio and adds "
            "the gradient of k2's bias. Set use_bias_correction_kl=False.",
            stacklevel=5,  # the line that makes the configuration
        )


def _warn_of_traps(config: "GRPOPlusConfig") -> None:
    """Settings that run without complaint and do not do what their reader expects."""
    if config.learning_rate == 0:
        warnings.warn(
            "learning_rate=0 trains nothing: every step leaves the weights as they are. Set a learning_rate above 0, "
            "or call evaluate() to measure a model.",
            stacklevel=5,  # the line that makes the configuration
        )
    if config.loss_type == "cispo" and config.epsilon_high is None:
        warnings.warn(
            f"loss_type='cispo' with epsilon_high unset clips the ratio at epsilon={config.epsilon}, and so scales "
            f"every token by {config.epsilon}. Set epsilon_high, to 5.0 for example.",
            stacklevel=5,  # the line that makes the configuration
        )
    on_policy = config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations) == 0
    loss = LOSSES[config.loss_type]
    on_policy = on_policy and not config.refill_buffer and not (loss.reads_sampling_ratio and config.use_vllm)
    if on_policy and loss.origin != "trl" and loss.reinforce_on_policy and loss.name != "reinforce":
        warnings.warn(
            f"loss_type={loss.name!r} with one update per batch of completions has the gradient of 'reinforce': every "
            "ratio is 1. To see it differ, set num_iterations above 1 or steps_per_generation above "
            "gradient_accumulation_steps.",
            stacklevel=5,  # the line that makes the configuration
        )


def _refuse(config: "GRPOPlusConfig", defaults: dict[str, Any], why: str) -> None:
    for name, default in defaults.items():
        value = getattr(config, name)
        if value != default:
            raise ValueError(f"loss_type={config.loss_type!r}: {name}={value!r} {why}.")
