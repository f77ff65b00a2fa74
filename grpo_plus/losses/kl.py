"""KL of the policy to a reference: three estimators from one sample per token, and a weight that follows a target.

All three estimate KL(π ‖ π_ref) from tokens that π generated. k1 is unbiased and may be negative, k2 is biased and
never negative, k3 is unbiased and never negative. Their *gradients* behave otherwise, because the expectation depends
on π too:

    estimator   gradient in a loss             times the importance ratio, on-policy
    k1          0 on average: useless          gradient of the KL
    k2          gradient of the KL, on-policy  gradient of the KL, plus that of k2's bias
    k3          gradient of KL(π_ref ‖ π)      gradient of the KL

So multiply k1 and k3 by the ratio (`kl_ratio="token"`, TRL's `use_bias_correction_kl`), and leave k2 as it is.
Schulman, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html);
DeepSeek-AI, "DeepSeek-V3.2" (https://huggingface.co/papers/2512.02556), on the ratio.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from grpo_plus.losses.inputs import LossInputs
from grpo_plus.losses.ratios import ImportanceSamplingLevel, importance_ratio
from grpo_plus.registry import suggestion

KLEstimator = Literal["k1", "k2", "k3"]


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio, log π − log π_ref. Unbiased, of high variance, negative for half of the tokens."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Half the squared log-ratio, (log π − log π_ref)² / 2. Biased, of low variance."""
    return (logps - ref_logps).square() / 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """π_ref/π − log(π_ref/π) − 1. Unbiased, of low variance, TRL's choice."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


KL_ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimators of a token's KL to the reference, by the name that `kl_estimator` takes."""


def kl_divergence(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """KL(π ‖ π_ref) of each token, (B, T), by the estimator of that name."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"Unknown kl_estimator {estimator!r}.{suggestion(str(estimator), KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator](logps, ref_logps)


def kl_to_reference(
    inputs: LossInputs, estimator: KLEstimator = "k3", ratio: ImportanceSamplingLevel | None = "token"
) -> Tensor:
    """KL term of the objective, (B, T), before its weight beta.

    Args:
        ratio: importance ratio that multiplies the estimate. None multiplies by nothing. TRL's ratio is
            `importance_sampling_level` with `use_bias_correction_kl`, and None without.
    """
    if inputs.ref_logps is None:
        raise ValueError("A KL term needs LossInputs.ref_logps, which is None. Pass them, or set beta=0.0.")
    kl = kl_divergence(inputs.logps, inputs.ref_logps, estimator)
    return kl if ratio is None else kl * importance_ratio(inputs, ratio)


@dataclass(frozen=True)
class AdaptiveBeta:
    """A weight for the KL term that keeps the KL near a target.

    β ← β · (1 + clip(KL / target − 1, ±0.2) · min(completions / horizon, 1))

    Keeps the KL where it should be. Under a fixed beta, the KL depends on the scale of the rewards. The minimum with 1
    is ours. Without that minimum, a step of more completions than the horizon could make beta jump or turn negative.
    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (https://huggingface.co/papers/1909.08593),
    section 2.2.

    Attributes:
        beta: the present weight. A checkpoint needs to keep nothing else.
        target_kl: the wanted KL, in the unit of the `kl` that `update` gets (per token, as TRL logs `kl`).
        horizon: completions that change beta by about a fifth, if the KL is off by 20 % or more.
    """

    beta: float
    target_kl: float
    horizon: int = 10_000

    def __post_init__(self) -> None:
        for name in ("beta", "target_kl", "horizon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"AdaptiveBeta({name}={getattr(self, name)!r}): beta moves by factors to a positive target, so "
                    f"{name} must be positive and finite."
                )

    def update(self, kl: float, completions: int = 1) -> "AdaptiveBeta":
        """Next controller, after a step that measured `kl` on so many completions.

        Raises:
            ValueError: `kl` is NaN, which would make beta NaN from then on.
        """
        if math.isnan(kl):
            raise ValueError("AdaptiveBeta.update got kl=nan. Look for a NaN among the log-probabilities.")
        error = min(max(kl / self.target_kl - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + error * min(completions / self.horizon, 1.0)))
