"""Which numbers TRL's fields can hold: TRL takes any, and fails at the first step or trains without a word."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from grpo_plus.advantages import check_weights

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig


@dataclass(frozen=True)
class Range:
    """The values of a field.

    Attributes:
        least: the smallest value.
        most: the largest value.
        above: whether `least` itself is too small.
        whole: whether it counts something. 4.0 is then taken as 4.
        infinite: whether infinity is a value, which stands for "no bound".
        optional: whether None is a value. Where TRL's default or its annotation has None, it always is.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    whole: bool = False
    infinite: bool = False
    optional: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is in the range. NaN never is."""
        if (math.isinf(value) and not self.infinite) or (self.whole and value % 1 != 0):
            return False
        return (value > self.least if self.above else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        if self.most < math.inf:
            return (
                f"a number above {self.least:g} and not above {self.most:g}"
                if self.above
                else f"a number from {self.least:g} to {self.most:g}"
            )
        kind = "a whole number" if self.whole else "a number" if self.infinite else "a finite number"
        if self.least == -math.inf:
            return kind
        return f"{kind} above {self.least:g}" if self.above else f"{kind} of {self.least:g} or more"


_FINITE, _POSITIVE, _NOT_NEGATIVE = Range(), Range(0, above=True), Range(0)
_BOUND, _SHARE, _COUNT = Range(0, infinite=True), Range(0, 1), Range(1, whole=True)

RANGES = {
    "beta": _NOT_NEGATIVE,
    "delta": Range(0, above=True, infinite=True),
    "entropy_coef": _FINITE,
    "entropy_coef_delta": _FINITE,
    "entropy_coef_max": _FINITE,
    "entropy_coef_min": _FINITE,
    "entropy_target": _FINITE,
    "epsilon": _BOUND,
    "epsilon_high": _BOUND,
    "generation_batch_size": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "max_completion_length": _COUNT,
    "max_grad_norm": Range(0, infinite=True, optional=True),
    "min_p": _SHARE,
    "num_generations": _COUNT,
    "num_iterations": _COUNT,
    "off_policy_mask_threshold": _BOUND,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _COUNT,
    "repetition_penalty": _POSITIVE,
    "router_aux_loss_coef": _FINITE,
    "sapo_temperature_neg": _POSITIVE,
    "sapo_temperature_pos": _POSITIVE,
    "steps_per_generation": _COUNT,
    "temperature": _POSITIVE,
    "top_entropy_quantile": _SHARE,
    "top_p": Range(0, 1, above=True),
    "vespo_k_neg": _FINITE,
    "vespo_k_pos": _FINITE,
    "vespo_lambda_neg": _FINITE,
    "vespo_lambda_pos": _FINITE,
    "vllm_importance_sampling_clip_max": _BOUND,
    "vllm_importance_sampling_clip_min": _BOUND,
    "weight_decay": _FINITE,
}


def check_numbers(config: Any) -> None:
    """Refuse a number of TRL's fields with which nothing can be trained. Numbers in text (1e-3 in YAML) become numbers.

    Args:
        config: a GRPOConfig, ours or TRL's; None for TRL's defaults.
    """
    if not isinstance(config, GRPOConfig):
        return
    for entry in fields(GRPOConfig):
        value = getattr(config, entry.name)
        if entry.name not in RANGES:
            continue
        optional = RANGES[entry.name].optional or entry.default is None or _may_be_none(entry.name)
        if value is not None or not optional:
            _check(config, entry.name, value, entry.default)
    if config.reward_weights is not None:
        config.reward_weights = check_weights(config.reward_weights)


def check_reward_timeout(config: "GRPOPlusConfig") -> None:
    """Refuse a timeout in which no reward function could return."""
    if config.reward_timeout is None:
        return
    seconds = _number(config.reward_timeout)
    if seconds is None or not _POSITIVE.holds(seconds):
        raise ValueError(f"reward_timeout={config.reward_timeout!r} must be a number of seconds above 0, or unset.")
    config.reward_timeout = seconds


def _may_be_none(name: str) -> bool:
    """Whether the field's annotation has None. The type of the field itself loses it in transformers' parser."""
    annotations = (vars(kind).get("__annotations__", {}) for kind in GRPOConfig.__mro__)
    return any("None" in str(found[name]) for found in annotations if name in found)


def _check(config: GRPOConfig, name: str, value: Any, default: Any) -> None:
    number = _number(value)
    if number is None or not RANGES[name].holds(number):
        raise ValueError(f"{name}={value!r} must be {RANGES[name]}. Write one, or leave {name} unset ({default!r}).")
    if RANGES[name].whole and not isinstance(value, int):
        setattr(config, name, int(number))
    elif isinstance(value, str):
        setattr(config, name, number)


def _number(value: Any) -> float | None:
    """The value as a float; None where it is no number, or too large for a float."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
