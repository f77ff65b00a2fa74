"""Which completions of a group take part in the update at all."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo_plus.advantages.reductions import RESOLUTION
from grpo_plus.advantages.rewards import Rewards


def pods(rewards: Rewards, *, keep: int) -> Rewards:
    """Train on the `keep` completions of each group whose rewards vary most; the others count as unjudged.

    S = argmax over |S| = keep of Var(rᵢ, i ∈ S): the k highest and the keep − k lowest rewards, for the best k

    Sampling is cheap beside the update, so sample many and learn from the telling ones. The dropped completions leave
    the group's statistics and get an advantage of 0. TRL's normalizers still count them: a loss that averages over
    sequences comes out keep/G of the paper's, a constant factor that the learning rate can take up.
    Xu et al., "PODS" (https://huggingface.co/papers/2504.13818), Algorithm 2.

    Args:
        keep: completions of each group, from 2. A group with fewer judged ones keeps them all.
    """
    if not isinstance(keep, int) or keep < 2:
        raise ValueError(f"keep={keep!r} does not fit: a whole number from 2 is needed, at most num_generations.")
    dropped = torch.stack([~_most_varied(total, keep) for total in rewards.total()])
    return replace(rewards, values=rewards.values.masked_fill(dropped.unsqueeze(-1), torch.nan))


def _most_varied(total: Tensor, keep: int) -> Tensor:
    """(G,) -> (G,) bool: the judged entries with the largest variance; of equally varied sets the one with more of the
    best.
    """
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
