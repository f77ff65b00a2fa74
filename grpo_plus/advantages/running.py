"""Estimators that remember earlier batches, so that the size of an advantage means the same from step to step.

Group and batch normalization erase how large rewards are: a task whose rewards grow fivefold gets the same advantages
as before. A running scale per task keeps the size of the step and still lets tasks of different scale share a run.
`task_column` names the dataset column that says the task. Without that column the whole run is one task.

The state is a dictionary of numbers that the function reads and updates in place. Every checkpoint saves the state, and
evaluation works on a copy. Every process sees all rewards and so keeps the same state.
"""

import math
import warnings
from collections import defaultdict

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import State, register
from grpo_plus.advantages.reductions import RESOLUTION, center, check_eps, divide, zscore
from grpo_plus.advantages.rewards import Rewards

# A batch may widen the range of a task's rewards by the first factor; beyond the second it is worth a warning.
WIDENING, SURPRISING = 10.0, 100.0
# Running means of a task without any reward so far.
UNKNOWN = (0.0, 1.0)


@register("ema_task", stateful=True, sums_to_zero=True)
def ema_task(rewards: Rewards, state: State, *, decay: float = 0.99, max_abs: float = 5.0, eps: float = 1e-6) -> Tensor:
    """Center on the group mean and divide by the task's running std.

        Aᵢ = (rᵢ − mean(r_group)) / (√max(m₂ − m₁², 10⁻⁶) + eps)
        m₁, m₂ ← running means of the task's r and r², updated before they are used; r as `bounded` lets it in

    A group in which some |A| exceeds `max_abs` falls back to its own population std, as in the authors' code. A jump of
    the rewards by more than about that factor is therefore lost.
    "OneThinker", EMA-GRPO (https://huggingface.co/papers/2512.03043).
    """
    if not max_abs > 0:
        raise ValueError(
            f"max_abs={max_abs!r} would send every group to its own std. Use a positive number such as 5.0."
        )
    total = rewards.total()
    sigma = torch.ones_like(total[:, :1])
    for task, prompts in _groups_of(rewards.tasks, total).items():
        _update_moments(state, task, bounded(state, task, total[prompts]), decay)
        sigma[prompts] = _sigma(state, task)
    advantages = divide(center(total), sigma, eps=eps)
    too_large = (advantages.abs() > max_abs).any(-1, keepdim=True)
    return torch.where(too_large, zscore(total, ddof=0, eps=eps), advantages)


@register("popart", stateful=True, trains_without_spread=True)
def popart(rewards: Rewards, state: State, *, decay: float = 0.99, eps: float = 1e-6) -> Tensor:
    """Center on the task's running mean and divide by the task's running std.

        Aᵢ = (rᵢ − m₁) / (√max(m₂ − m₁², 10⁻⁶) + eps)            r as `bounded` lets it in
        m₁, m₂ ← running means of the task's r and r², updated before they are used

    The baseline is the history of the task, not the group. A group of successes has a positive advantage while the
    task as a whole still fails, so no group is dead. These are PopArt's statistics, taken of rewards and not of a
    critic's targets.
    van Hasselt et al., "Learning values across many orders of magnitude" (https://huggingface.co/papers/1602.07714),
    section 2.1. Per task as in Hessel et al. (https://huggingface.co/papers/1809.04474).
    """
    check_eps(eps)
    total = rewards.total()
    advantages = torch.zeros_like(total)
    for task, prompts in _groups_of(rewards.tasks, total).items():
        values = bounded(state, task, total[prompts])
        _update_moments(state, task, values, decay)
        advantages[prompts] = (values - state.get(task, UNKNOWN)[0]) / (_sigma(state, task) + eps)
    return advantages


@register("spo", stateful=True, domain="unit", needs_prompts=True, trains_without_spread=True)
def spo(
    rewards: Rewards, state: State, *, rho: float = 0.9, prior: float = 0.5, strength: float = 8.0, eps: float = 1e-8
) -> Tensor:
    """Subtract each prompt's tracked success rate, then normalize over the batch.

        p = α / (α + β),  xᵢ = rᵢ − p,  Aᵢ = (xᵢ − mean(x)) / (std(x) + eps)            p as it was before this batch
        α ← ρ α + Σ r,  β ← ρ β + Σ (1 − r)                                            over the prompt's completions

    For rewards from 0 to 1 and data that the run sees several times. The baseline needs no group. In the paper ρ
    follows the policy's KL since the prompt's last visit, between 0.875 and 0.96, and extra samples estimate the first
    p. Here ρ is constant, and a new prompt starts at `prior`, worth `strength` completions.
    "Single-stream Policy Optimization" (https://huggingface.co/papers/2509.13232).
    """
    _check_share("rho", rho)
    _check_share("prior", prior)
    if not 0 < strength < math.inf:
        raise ValueError(f"strength={strength!r} is no number of completions. Use a positive one, such as 8.0.")
    total = rewards.total()
    _check_unit(rewards, total)
    centered = torch.full_like(total, torch.nan)
    for prompt, rows in _groups_of(rewards.prompts, total).items():
        alpha, beta = state.get(prompt, (strength * prior, strength * (1 - prior)))
        centered[rows] = total[rows] - alpha / (alpha + beta)
        judged = total[rows][~total[rows].isnan()]
        if judged.numel() == 0:
            continue  # a visit without a verdict tells nothing, and must not fade what is known
        state[prompt] = [rho * alpha + judged.sum().item(), rho * beta + (1 - judged).sum().item()]
    return zscore(centered.flatten(), eps=eps).view_as(centered)


def _groups_of(keys: tuple[str, ...] | None, total: Tensor) -> dict[str, list[int]]:
    """Rows of `total` by key. Without keys, all rows under ""."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys if keys is not None else [""] * len(total)):
        groups[key].append(row)
    return groups


def bounded(state: State, task: str, values: Tensor) -> Tensor:
    """The task's rewards, limited in size to `WIDENING` times the largest that the task has shown before.

    One wrong reward of 1e6 among 0 and 1 would set the scale for hundreds of batches. A scale that does change is
    reached in a few batches, since what is let in widens the range. A task without rewards other than 0 has no range.
    In a task's first batch, a reward of `SURPRISING` times the second largest counts as the second largest.

    Args:
        values: the task's rewards, NaN where nothing was judged; any shape.
    """
    sizes = values[~values.isnan()].abs().sort().values
    if not len(sizes):
        return values
    first = len(state.get(task, ())) < 3
    known = sizes[-2:][0].item() if first else state[task][2]
    largest = sizes[-1].item()
    if known == 0 or largest <= (SURPRISING if first else WIDENING) * known:
        return values
    limit = known if first else WIDENING * known  # the first batch sets the means by itself
    if largest > SURPRISING * known:
        where = f"task {task!r}" if task else "the run"
        warnings.warn(
            f"A reward of size {largest:.6g} in {where}, whose rewards had sizes of up to {known:.6g}. It counts as "
            f"{limit:.6g} in the running scale, which follows within a few batches if such rewards go on. If it is an "
            "error, check the reward function. advantages/scale in the log shows the scale.",
            stacklevel=2,
        )
    return values.clamp(-limit, limit)


def scales(name: str, state: State) -> dict[str, float]:
    """The running std of each task of `ema_task` and `popart`, by task; {} for other estimators."""
    return {task: _sigma(state, task) for task in state} if name in ("ema_task", "popart") else {}


def _sigma(state: State, task: str) -> float:
    moments = state.get(task, UNKNOWN)
    return max(moments[1] - moments[0] ** 2, 1e-6) ** 0.5


def _update_moments(state: State, task: str, values: Tensor, decay: float) -> None:
    """Update the running means of the task's rewards and of their squares, and the largest size of a reward.

    The first batch sets all three.
    """
    _check_share("decay", decay)
    judged = values[~values.isnan()]
    if judged.numel() == 0:
        return
    batch = [judged.mean().item(), judged.square().mean().item()]
    before = state.get(task, batch)
    means = [decay * old + (1 - decay) * new for old, new in zip(before[:2], batch, strict=True)]
    state[task] = [*means, max([judged.abs().max().item(), *before[2:]])]


def _check_unit(rewards: Rewards, total: Tensor) -> None:
    if ((total < -RESOLUTION) | (total > 1 + RESOLUTION)).any():
        raise ValueError(
            f"spo needs rewards from 0 to 1, but {rewards.described_total()}. Scale them, or set reward_weights that "
            "sum to 1."
        )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is not a share. Use a number from 0 to 1.")
