"""Estimators that compare a completion with the other completions of its prompt and scale by the group's spread.

`grpo` is TRL's default, `grpo_pop` the arithmetic of most tutorials, `loo_std` NeMo RL's default. `ngrpo` lets a
prompt train that no completion solved. All four give every prompt about the same weight, however little its rewards
vary: a group whose rewards differ by 0.01 moves the policy as much as a group whose rewards differ by 1.
"""

import math

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import center_on_others, check_eps, others, std, zscore
from grpo_plus.advantages.rewards import Rewards


@register("grpo", scope="group", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def grpo(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Center on the group mean and divide by the group's sample std, as TRL's scale_rewards="group".

        Aᵢ = (rᵢ − mean(r)) / (std(r) + eps)

    The paper does not say which std it means. Implementations differ in `ddof` and `eps` (TRL 1, 1e-4; verl 1, 1e-6;
    OpenRLHF 1, 1e-9; articles and numpy 0, 0). A group without spread gets exactly 0.
    Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), section 4.1.2.

    Args:
        ddof: the sum of squares is divided by G − ddof.
        eps: added to the std.
    """
    return zscore(rewards.total(), ddof=ddof, eps=eps)


@register("grpo_pop", scope="group", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def grpo_pop(rewards: Rewards, *, eps: float = 0.0) -> Tensor:
    """Center on the group mean and divide by the group's population std.

        Aᵢ = (rᵢ − mean(r)) / √(mean((r − mean(r))²))

    numpy's std gives this, and so do most worked examples. It is √(G/(G−1)) times `grpo` without eps.
    Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), section 4.1.2.
    """
    return zscore(rewards.total(), ddof=0, eps=eps)


@register("loo_std", scope="group", shift_invariant=True)
def loo_std(rewards: Rewards, *, eps: float = 1e-6) -> Tensor:
    """Center on the mean and divide by the sample std of the *other* completions, as NeMo RL does.

        Aᵢ = (rᵢ − mean(rⱼ, j ≠ i)) / (std(rⱼ, j ≠ i) + eps)

    Neither statistic depends on the completion that is judged, so an outlier cannot hide in a std of its own making.
    Nothing is divided where the other completions are all alike (always with G = 2). The only success of a group then
    gets 1, not infinity. The advantages of a group do not sum to zero.
    The baseline is that of Ahmadian et al., "Back to Basics" (https://huggingface.co/papers/2402.14740). The std has no
    paper; NeMo RL's GRPOAdvantageEstimator divides by it.
    """
    check_eps(eps)
    total = rewards.total()
    spread = std(others(total), ddof=1).squeeze(-1)
    return center_on_others(total) / (spread + eps).where(spread > 0, 1.0)


@register("ngrpo", scope="group", trains_without_spread=True)
def ngrpo(rewards: Rewards, *, r_max: float = 1.0, eps: float = 1e-6) -> Tensor:
    """z-score in a group that holds one virtual completion with the best possible reward.

        r' = (r₁, …, r_G, r_max)        Aᵢ = (rᵢ − mean(r')) / (std(r') + eps)

    A group of failures only has no spread, and trains nothing in `grpo`. Beside a virtual success, the failures are
    below average, and the policy moves away from them. A group of r_max only still gets 0. The paper pairs the
    estimator with a clip range that is narrower for negative advantages (epsilon below epsilon_high).
    Nan et al., "NGRPO" (https://huggingface.co/papers/2509.18851).

    Args:
        r_max: the best weighted sum of rewards that a completion can reach. Another value gives meaningless advantages.
    """
    if not math.isfinite(r_max):
        raise ValueError(f"r_max={r_max!r} is no reward that a completion can reach. Use a finite number such as 1.0.")
    total = rewards.total()
    virtual = torch.full_like(total[:, :1], r_max)
    return zscore(torch.cat([total, virtual], dim=-1), ddof=1, eps=eps)[:, :-1]
