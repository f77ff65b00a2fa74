"""Select the completions of a group that take part in the update."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo_plus.advantages.reductions import RESOLUTION
from grpo_plus.advantages.rewards import Rewards


def pods(rewards: Rewards, *, keep: int) -> Rewards:
    """Train on the `keep` completions of each group whose rewards vary most. The rest counts as unjudged.

        kept = argmax of Var(rᵢ, i ∈ kept): the h highest and the keep − h lowest rewards, for the best h

    Sampling is cheap beside the update, so sample many completions and learn from the telling ones. Dropped completions
    leave the group's statistics and get an advantage of 0. TRL's normalizers still count them, so a loss that averages
    over sequences is keep/G of the paper's. The learning rate can take up this constant factor.
    Xu et al., "PODS" (https://huggingface.co/papers/2504.13818), Algorithm 2.

    Args:
        keep: completions per group, at least 2. A group with fewer judged completions keeps them all.
    """
    if not isinstance(keep, int) or keep < 2:
        raise ValueError(f"keep={keep!r} does not fit: a whole number from 2 is needed, at most num_generations.")
    dropped = torch.stack([~_most_varied(total, keep) for total in rewards.total()])
    return replace(rewards, values=rewards.values.masked_fill(dropped.unsqueeze(-1), torch.nan))


def _most_varied(total: Tensor, keep: int) -> Tensor:
    """Judged entries with the largest variance, (G,) -> (G,) bool. Among equally varied sets, the best entries win."""
    judged = (~total.isnan()).nonzero().flatten()
    ascending = judged[total[judged].argsort(stable=True)]
    if len(ascending) <= keep:
        return ~total.isnan()
    best, best_variance = ascending[-keep:], -1.0
    for highest in range(keep, -1, -1):
        chosen = torch.cat([ascending[: keep - highest], ascending[len(ascending) - highest :]])
        variance = total[chosen].var(correction=0).item()
        if variance > best_variance * (1 + RESOLUTION):
            best, best_variance = chosen, variance
    return torch.zeros_like(total, dtype=torch.bool).index_fill(0, best, True)
