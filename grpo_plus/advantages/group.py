"""Estimators that compare a completion with the other completions of its prompt and scale by the group's spread.

`grpo` is TRL's default, `grpo_pop` the arithmetic of most tutorials. Both give every prompt the same weight,
however little its rewards vary: a group that differs by 0.01 moves the policy as much as one that differs by 1.
"""

from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.reductions import zscore


@register("grpo", scope="group", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def grpo(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Centre on the group mean and divide by the group's sample std, as TRL's scale_rewards="group".

    Aᵢ = (rᵢ − mean(r)) / (std(r) + eps)

    The paper writes std(r) without saying which; implementations differ in `ddof` and `eps` (TRL 1, 1e-4; verl 1,
    1e-6; articles and numpy 0, 0). A group without spread gets exactly 0.
    Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), section 4.1.2.
    """
    return zscore(rewards.total(), ddof=ddof, eps=eps)


@register("grpo_pop", scope="group", shift_invariant=True, scale_invariant=True, sums_to_zero=True)
def grpo_pop(rewards: Rewards, *, eps: float = 0.0) -> Tensor:
    """Centre on the group mean and divide by the group's population std.

    Aᵢ = (rᵢ − mean(r)) / √(mean((r − mean(r))²))

    What numpy's std gives, and with it most worked examples: √(G/(G−1)) times `grpo` without its eps.
    Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), section 4.1.2.
    """
    return zscore(rewards.total(), ddof=0, eps=eps)
