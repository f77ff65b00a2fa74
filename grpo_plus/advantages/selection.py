"""Select the completions of a group that take part in the update."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import check_choice
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
    _check_keep(keep)
    return _without(rewards, torch.stack([~_most_varied(total, keep) for total in rewards.total()]))


def gfpo(rewards: Rewards, *, keep: int, metric: str = "length") -> Rewards:
    """Train on the `keep` shortest completions of each group, or those of most reward per token. The rest is unjudged.

        kept = the keep completions of least |yᵢ|, or of largest rᵢ / |yᵢ|
        Aᵢ by any estimator, among the kept alone

    Sample many, and learn from the concise ones alone: answers stay short, and no reward has to say how short. A wrong
    answer can be among the shortest, and the estimator then pushes it down. Of equals the first are kept. Dropped
    completions leave the group's statistics and get an advantage of 0, as with `pods`.
    Shrivastava et al., "Sample More to Think Less" (https://huggingface.co/papers/2508.09726). With the estimator
    `grpo` these are the advantages of TRL's removed GFPOTrainer. The paper's variant that keeps more completions of a
    harder prompt is left out: it has to remember how hard earlier prompts were, and modifiers remember nothing.

    Args:
        keep: completions per group, at least 2. A group with fewer judged completions keeps them all.
        metric: "length", or "token_efficiency" for the reward per token.
    """
    _check_keep(keep)
    check_choice("metric", metric, ("length", "token_efficiency"))
    total, tokens = rewards.total(), rewards.tokens()
    cost = tokens if metric == "length" else -total / tokens
    place = cost.where(rewards.judged, torch.inf).argsort(stable=True).argsort()
    return _without(rewards, place >= keep)


def _check_keep(keep: object) -> None:
    if not isinstance(keep, int) or keep < 2:
        raise ValueError(f"keep={keep!r} does not fit: a whole number from 2 is needed, at most num_generations.")


def _without(rewards: Rewards, dropped: Tensor) -> Rewards:
    """The rewards with the dropped completions, (P, G) bool, unjudged."""
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
