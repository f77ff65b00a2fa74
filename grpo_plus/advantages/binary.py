"""Estimators for rewards that say whether a completion solved its prompt: the success rate p sets the scale.

`maxrl` maximizes log p instead of p. `passk` and `pkpo` maximize the chance that one of k attempts succeeds, and only
`passk` divides by the std of that chance. `bnpo_advantage` adapts the weight of p to the batch. All four put more
weight on hard prompts than `dr_grpo`. They want one reward function of 0 or 1, with weight 1. `maxrl` and
`bnpo_advantage` take grades too.
"""

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import RESOLUTION, center, center_on_others, count, divide, mean, rounding, std
from grpo_plus.advantages.rewards import Rewards


@register("maxrl", scope="group", scale_invariant=True, sums_to_zero=True)
def maxrl(rewards: Rewards, *, eps: float = 0.0) -> Tensor:
    """Center on the group mean and divide by it; 0 where the mean is not positive.

        Aᵢ = (rᵢ − mean(r)) / (mean(r) + eps)

    The group estimates the gradient of log p, not of p. A prompt that is solved once in eight weighs eight times as
    much as a prompt that is nearly always solved. For rewards that are not negative, where |A| < G. A negative mean
    would flip the sign of every advantage, and a mean near 0 would make every advantage huge, so such a group gets 0.
    Rewards of both signs give such a mean by chance. For those rewards another estimator is the better choice.
    Tajwar et al., "Maximum Likelihood Reinforcement Learning" (https://huggingface.co/papers/2602.02710). The authors'
    code adds eps = 1e-6 and does not guard.
    """
    total = rewards.total()
    average = mean(total)
    return divide(center(total), average.where(average > rounding(total), 0.0), eps=eps)


@register("passk", scope="group", domain="binary", sums_to_zero=True)
def passk(rewards: Rewards, *, k: int = 2, eps: float = 1e-6) -> Tensor:
    """Gain of a completion in the chance that k attempts hold a correct one, in units of that chance's std.

        ρ = 1 − C(G−c, k)/C(G, k)                  chance that k of the group's completions hold one of the c correct
        ρᵢ = 1 − C(G−c−1, k−1)/C(G−1, k−1)         the same chance for draws that hold i; 1 if i is correct
        Aᵢ = (ρᵢ − ρ) / (√(ρ(1 − ρ)) + eps)

    For keeping a model's attempts diverse. A prompt with a correct completion in every draw trains nothing.
    Chen et al., "Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large Reasoning Models"
    (https://huggingface.co/papers/2508.10751), the analytical form.

    Args:
        k: attempts, from 1 to num_generations; 1 is `grpo_pop`. A group with fewer judged completions draws them all.
    """
    _check_k("passk", k, rewards)
    solved = _solved("passk", rewards)
    judged, correct = count(solved), solved.nansum(-1, keepdim=True)
    rho = 1 - all_wrong(judged - correct, judged, k)
    rho_with = (1 - all_wrong(judged - correct - 1, judged - 1, k - 1)).where(solved == 0, 1.0)
    return divide(rho_with - rho, (rho * (1 - rho)).sqrt(), eps=eps)


@register("pkpo", scope="group", domain="binary", sums_to_zero=True)
def pkpo(rewards: Rewards, *, k: int = 2) -> Tensor:
    """Unbiased gradient of pass@k with a leave-one-out baseline, not divided by a std.

        sᵢ = rᵢ · C(G−c, k−1)/C(G−1, k−1)               chance that i is correct and the k − 1 others drawn are wrong
        Aᵢ = sᵢ − mean(sⱼ, j ≠ i)

    Unlike in `passk`, the size of the gain reaches the gradient, and an almost solved prompt still trains a little.
    Walder and Karkhanis, "Pass@K Policy Optimization" (https://huggingface.co/papers/2505.15201).

    Args:
        k: attempts, from 1 to num_generations; 1 is `rloo`. A group with fewer judged completions draws them all.
    """
    _check_k("pkpo", k, rewards)
    solved = _solved("pkpo", rewards)
    judged, correct = count(solved), solved.nansum(-1, keepdim=True)
    return center_on_others(solved * all_wrong(judged - correct, judged - 1, k - 1))


@register("bnpo_advantage", domain="unit", sums_to_zero=True)
def bnpo_advantage(rewards: Rewards, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Center on the group mean and divide by a Beta density of the success rate, fitted to the batch.

        Aᵢ = (rᵢ − p) · min(1/Beta(p; α, β), 10⁶)       r mapped from [low, high] to [0, 1], p = mean(r) of the group
        α = max(1 + a/3, 1), β = max(1 + b/3, 1)        Beta(a, b) has the mean and variance of the batch's p

    The weight follows the spread of the batch's success rates: α = β = 1 is `dr_grpo`, and α = β = 3/2 is `grpo_pop`
    times π/8. One prompt, or the same p for all prompts, leaves no spread to fit, and α = β = 1. (TRL's
    loss_type="bnpo" is something else.)
    Xiao et al., "BNPO: Beta Normalization Policy Optimization" (https://huggingface.co/papers/2506.02864), with the
    sample variance, as in the authors' code.

    Args:
        low: least weighted sum of rewards that a completion can get.
        high: greatest weighted sum.
    """
    unit = _unit(rewards, low, high)
    p = mean(unit)
    alpha, beta = _beta_of(p)
    log_density = torch.xlogy(alpha - 1, p) + torch.xlogy(beta - 1, 1 - p)
    log_density = log_density + (alpha + beta).lgamma() - alpha.lgamma() - beta.lgamma()
    return center(unit) * (-log_density).exp().clamp(max=1e6)


def _beta_of(p: Tensor) -> tuple[Tensor, Tensor]:
    """α and β of BNPO's normalizing density from the success rates (P, 1)."""
    average, variance = mean(p.T), std(p.T, ddof=1).square()
    strength = (average * (1 - average) / variance - 1).where(variance > 0, 0.0)
    return (1 + average * strength / 3).clamp(min=1), (1 + (1 - average) * strength / 3).clamp(min=1)


def all_wrong(wrong: Tensor, judged: Tensor, draws: int) -> Tensor:
    """C(wrong, draws)/C(judged, draws), the chance that all completions of a draw without replacement are wrong."""
    chance = torch.ones_like(judged)
    for drawn in range(draws):
        left = (wrong - drawn) / (judged - drawn).clamp(min=1)
        chance = chance * left.where(judged > drawn, 1.0)
    return chance


def _check_k(name: str, k: int, rewards: Rewards) -> None:
    generations = rewards.values.shape[1]
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} is not a number of attempts. Use a whole number from 1 to num_generations.")
    if k > generations:
        raise ValueError(
            f"{name} draws k={k} of a group's completions, but there are {generations} (num_generations, in "
            "evaluation num_generations_eval). Lower k, or generate more completions per prompt."
        )


def _solved(name: str, rewards: Rewards) -> Tensor:
    """(P, G) 1 for a correct completion, 0 for a wrong one, NaN for an unjudged one."""
    total = rewards.total()
    solved = total.round()
    rounded = (total - solved).abs() <= RESOLUTION
    if not ((rounded & ((solved == 0) | (solved == 1))) | total.isnan()).all():
        raise ValueError(
            f"{name} needs a reward of 0 or 1, but {rewards.described_total()}. Use one such reward function."
        )
    return solved


def _unit(rewards: Rewards, low: float, high: float) -> Tensor:
    """(P, G) the weighted sums of the rewards, mapped from [low, high] to [0, 1]."""
    if not low < high:
        raise ValueError(f"low={low!r} and high={high!r} bound no rewards. Make low smaller than high.")
    unit = (rewards.total() - low) / (high - low)
    if ((unit < -RESOLUTION) | (unit > 1 + RESOLUTION)).any():
        raise ValueError(
            f"bnpo_advantage needs rewards from low={low} to high={high}, but {rewards.described_total()}. Set low and "
            "high to the least and greatest reward that a completion can get."
        )
    return unit.clamp(0, 1)
