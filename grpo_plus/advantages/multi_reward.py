"""Estimators that look at the reward functions one by one before they sum.

A sum forgets where it came from: (correct, malformed) and (wrong, well-formed) may add up to the same number. These
keep the difference, and keep a reward with a large spread from drowning one with a small spread.
"""

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import check_choice, register
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.reductions import divide, has_spread, std, zscore


@register("gdpo", shift_invariant=True, scale_invariant=True, sums_to_zero=True, multi_reward=True)
def gdpo(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4, batch_over: str = "all") -> Tensor:
    """Normalize each reward in its group, sum, normalize over the batch, as TRL's "normalize_then_sum".

    xᵢ = Σₖ wₖ (rᵢₖ − mean(rₖ)) / (std(rₖ) + eps)        over the group
    Aᵢ = (xᵢ − mean(x)) / (std(x) + eps)                 over the batch, where mean(x) is 0 by construction

    For several rewards of different scale or difficulty.
    Liu et al., "GDPO" (https://huggingface.co/papers/2601.05242), Eq. 4-6.

    Args:
        batch_over: whose x the batch's std is taken over. "all", as in the paper and in TRL: the zeros of dead groups
            (x = 0 throughout) make it smaller, and so the live groups larger, by √((N−1)/(N_live−1)): 3.2 for one
            live group of four beside seven dead ones. "live" leaves dead groups out.
    """
    return _over_batch(_normalize_then_sum(rewards, ddof=ddof, eps=eps), ddof=ddof, eps=eps, batch_over=batch_over)


def _normalize_then_sum(rewards: Rewards, *, ddof: int, eps: float) -> Tensor:
    """(P, G) weighted sum of each reward's z-score in its group."""
    return rewards.weighted_sum(zscore(rewards.values.transpose(1, 2), ddof=ddof, eps=eps).transpose(1, 2))


def _over_batch(summed: Tensor, *, ddof: int, eps: float, batch_over: str) -> Tensor:
    """Divide by the std over the batch, or over its groups that have any spread."""
    check_choice("batch_over", batch_over, ("all", "live"))
    counted = summed if batch_over == "all" else summed.where(has_spread(summed), torch.nan)
    return divide(summed, std(counted.flatten(), ddof=ddof), eps=eps)
