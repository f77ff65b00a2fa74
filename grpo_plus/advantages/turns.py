"""Advantages per turn: a completion is judged as a whole, and each of its turns beside turns from the same state.

For tool loops and environments of several turns. `process` (process.py) fits steps that have no states.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import center, check_eps, zscore
from grpo_plus.advantages.rewards import Rewards


@register(
    "turns",
    scope="group",
    scale_invariant=True,
    needs_lengths=True,
    trains_without_spread=True,
    needs_steps=True,
    needs_turns=True,
)
def turns(
    rewards: Rewards, *, omega: float = 1.0, gamma: float = 0.95, scale: bool = True, ddof: int = 1, eps: float = 1e-6
) -> Tensor:
    """Add to a completion's advantage that of each turn among the group's turns from the same state: GiGPO.

        Aᴱᵢ = (Rᵢ − mean(R)) / F(R)                    R: the rewards of the group's completions
        qᵢₜ = rᵢₜ + γ rᵢ,ₜ₊₁ + γ² rᵢ,ₜ₊₂ + …             r: the rewards of turns, from turn t on
        Aˢᵢₜ = (qᵢₜ − mean(q)) / F(q)                  over the group's turns that start from the state of turn t
        Aᵢₜ = Aᴱᵢ + ω Aˢᵢₜ                             for every token of turn t

    A failed completion may hold good turns, and a success bad ones. Where two completions of a group come to the same
    state, what follows says which turn did better. A turn whose state occurs once gets Aᴱ alone. In the log,
    `advantages/turns_shared` is the share of turns that are compared. A completion of one turn gets (1 + ω) Aᴱ.

    A turn is a run of tokens that the policy wrote. Its state is what a tool or the environment wrote before it, or the
    prompt. A completion's reward falls on its last turn. A reward function says otherwise through TRL's `log_extra`,
    with one list per completion: `step_rewards`, `step_states`, `step_ends`. So do columns of these names.
    Feng et al., "Group-in-Group Policy Optimization" (https://huggingface.co/papers/2505.10978), equations 3 and 5 to
    8. They were read in the authors' code (verl-agent, gigpo/core_gigpo.py) and not in the paper. In mean(R) and F(R),
    that code counts a completion once per turn. Here it counts once, which the code calls the standard advantage.

    Args:
        omega: weight of the turn's advantage. 0 leaves the completion's own.
        gamma: discount per turn, 0 to 1. Below 1, the shorter way to a reward is the better one.
        scale: whether F is the std plus eps. F is 1 otherwise, as in the authors' configuration unless one sets it.
    """
    _check(omega, gamma, eps)
    if rewards.spans is None:
        raise ValueError("advantage_estimator='turns' needs the lengths of the completions: set lengths.")
    steps = rewards.steps
    if steps is None or steps.states is None:
        raise ValueError(
            "advantage_estimator='turns' needs the turns of the completions and the states that they start from, and "
            "these rewards come without. A training finds them by itself. A log holds them as step_ends and "
            "step_states where the run had this estimator."
        )

    def normalized(values: Tensor) -> Tensor:
        return zscore(values, ddof=ddof, eps=eps) if scale else center(values)

    total = rewards.total()
    returns = _discounted(steps.scored(total), gamma)
    keys, taken = steps.by_state(rewards.judged)
    of_turns = torch.zeros_like(returns).masked_scatter(taken, _normalized_within(keys, returns[taken], normalized))
    per_turn = (normalized(total).unsqueeze(-1) + omega * of_turns).where(taken, 0.0)
    return _per_token(per_turn, steps.ends, num_tokens=max(1, int(rewards.spans.max())))


def _discounted(rewards: Tensor, gamma: float) -> Tensor:
    """Sum of each step's reward and the later ones, discounted: (..., J) -> (..., J). NaN, at the end, stays NaN."""
    returns, later = torch.full_like(rewards, torch.nan), torch.zeros_like(rewards[..., 0])
    for step in reversed(range(rewards.shape[-1])):
        returns[..., step] = rewards[..., step] + gamma * later
        later = returns[..., step].nan_to_num()
    return returns


def _normalized_within(keys: Tensor, values: Tensor, normalized: Callable[[Tensor], Tensor]) -> Tensor:
    """Values (n,), normalized among those of the same key. The only value of its key becomes 0."""
    if not len(keys):
        return values
    _, row, counts = keys.unique(return_inverse=True, return_counts=True)
    # One row per key, filled up with NaN, so that one call normalizes all of them.
    order = row.argsort(stable=True)
    column = torch.empty_like(order)
    column[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[row[order]]
    table = values.new_full((len(counts), int(counts.max())), torch.nan)
    table[row, column] = values
    return normalized(table)[row, column]


def _per_token(per_turn: Tensor, ends: Tensor, *, num_tokens: int) -> Tensor:
    """Each turn's advantage at its tokens and at what a tool wrote before it, (P, G, T). 0 after the last turn."""
    prompts, generations, _ = ends.shape
    tokens = torch.arange(num_tokens).expand(prompts, generations, -1).contiguous()
    turn = torch.searchsorted(ends.where(ends >= 0, num_tokens), tokens)
    return F.pad(per_turn, (0, 1)).gather(-1, turn)


def _check(omega: float, gamma: float, eps: float) -> None:
    check_eps(eps)
    if not 0 <= omega < math.inf:
        raise ValueError(f"omega={omega!r} is no weight of the turns' advantages. Use 0 or a number such as 1.0.")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma!r} is no discount per turn. Use a number from 0 to 1, such as 0.95.")
