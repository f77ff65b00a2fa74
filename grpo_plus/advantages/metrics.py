"""Figures of one generation batch, logged under `advantages/`: which rewards and tasks drive the update, and how."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grpo_plus.advantages.reductions import RESOLUTION, center, has_spread, zscore
from grpo_plus.advantages.rewards import Rewards
from grpo_plus.advantages.steps import Steps

LOGGED_TASK_SHARE = "advantages/task_share/"


def advantage_metrics(
    rewards: Rewards,
    advantages: Tensor,
    *,
    limit: Tensor | float | None = None,
    normalizes_each: bool = False,
    by_steps: bool = False,
    rounded: bool = False,
) -> dict[str, float]:
    """All figures of one batch. A figure that the batch cannot give (one reward, no lengths) is left out.

    Args:
        rewards: the rewards that the estimator saw, after the reward modifiers.
        advantages: (P, G) advantages that reach the loss.
        limit: largest |A| that the `clip` modifier let through; (P, G) if later modifiers changed it. None without it.
        normalizes_each: whether the estimator divides each reward function by its own spread before the sum.
        by_steps: whether the estimator judges the rewards of steps alone, not what the function returned.
        rounded: whether the estimator leaves rounding where rewards have no spread, as TRL does. Ours give exactly 0.
    """
    size = advantages.abs()
    metrics = {
        "frac_zero": (size == 0).double().mean().item(),
        "dead_groups": dead_groups(rewards, advantages, normalizes_each=normalizes_each, rounded=rounded),
        "max_abs": size.max().item(),
        "effective_samples": effective_samples(advantages),
    }
    if limit is not None:
        # In float32, as they reach the loss, a clipped value is the limit to rounding.
        metrics["frac_clipped"] = ((size >= limit * (1 - RESOLUTION)) & (size > 0)).double().mean().item()
    metrics |= {f"zero_spread/{name}": share for name, share in zero_spread(rewards, by_steps=by_steps).items()}
    if rewards.weights.count_nonzero() > 1:
        shares = reward_shares(rewards, normalizes_each=normalizes_each)
        metrics |= {f"reward_share/{name}": share for name, share in shares.items()}
        metrics["conflict"] = conflict(rewards)
    if rewards.tasks is not None:
        metrics |= {f"task_share/{task}": share for task, share in task_shares(rewards.tasks, advantages).items()}
    if rewards.lengths is not None:
        metrics["length_correlation"] = correlation(advantages, rewards.lengths, rewards.judged)
    if rewards.steps is not None and rewards.steps.states is not None:
        metrics["turns_shared"] = turns_shared(rewards.steps, rewards.judged)
    return metrics


def dead_groups(rewards: Rewards, advantages: Tensor, *, normalizes_each: bool = False, rounded: bool = False) -> float:
    """Share of groups in which every advantage is 0. Such groups take part in no update.

    A weighted sum without spread does not make a group dead: `gdpo` trains a group whose parts differ and cancel, and
    `ngrpo` a group of failures only. With `rounded`, rounding does not save a group whose rewards have no spread.
    """
    dead = (advantages == 0).all(-1)
    if rounded:
        weighted = rewards.values[..., rewards.weights != 0]
        differs = has_spread(weighted.transpose(1, 2)).any(1) if normalizes_each else has_spread(rewards.total())
        dead |= ~differs.squeeze(-1)
    return dead.double().mean().item()


def zero_spread(rewards: Rewards, *, by_steps: bool = False) -> dict[str, float]:
    """Share of judged groups in which a reward function gave every completion the same reward, by function.

    "total" is the weighted sum. TRL logs one figure for all functions. Under scale_rewards="batch" and
    normalize_then_sum, TRL's figure is a flag of the batch and no share. With `by_steps`, the rewards of all steps
    replace the rewards of the functions that count.
    """
    columns = {name: rewards.values[..., k] for k, name in enumerate(rewards.names)} | {"total": rewards.total()}
    if by_steps and rewards.steps is not None:
        steps = rewards.steps.scored(rewards.total()).flatten(1)
        columns |= dict.fromkeys([*_counting(rewards), "total"], steps)
    judged = {name: values[~values.isnan().all(-1)] for name, values in columns.items()}
    return {name: (~has_spread(values)).double().mean().item() for name, values in judged.items() if len(values)}


def reward_shares(rewards: Rewards, *, normalizes_each: bool = False) -> dict[str, float]:
    """Share of each function in the weighted, centered rewards: Σᵢ|cᵢₖ| / Σᵢₗ|cᵢₗ|, cᵢₖ = wₖ(rᵢₖ − mean(rₖ)).

    A function near 1 drives the update alone, whatever the weights say. With `normalizes_each`, c is divided by the
    function's std in the group. Functions of weight 0 have no share.
    """
    size = contributions(rewards, normalizes_each=normalizes_each).abs().nansum((0, 1))
    total = size.sum().clamp(min=torch.finfo(size.dtype).tiny)
    shares = dict(zip(rewards.names, (size / total).tolist(), strict=True))
    return {name: shares[name] for name in _counting(rewards)}


def conflict(rewards: Rewards) -> float:
    """Share of judged completions that one reward function puts above its group's mean and another below."""
    parts = contributions(rewards)
    opposed = (parts > 0).any(-1) & (parts < 0).any(-1)
    return (opposed.sum() / rewards.judged.sum().clamp(min=1)).item()


def task_shares(tasks: tuple[str, ...], advantages: Tensor) -> dict[str, float]:
    """Each task's share of Σ|A|."""
    per_prompt = advantages.abs().sum(-1)
    total = per_prompt.sum().clamp(min=torch.finfo(per_prompt.dtype).tiny)
    shares = dict.fromkeys(sorted(set(tasks)), 0.0)
    for task, size in zip(tasks, (per_prompt / total).tolist(), strict=True):
        shares[task] += size
    return shares


def share_with_absent_tasks(logged: Mapping[str, list[float]], values: dict[str, float]) -> None:
    """Give a share of 0 to each task that a batch lacks, because a log averages only over the values that are there.

    Args:
        logged: figures of the batches since the last log, by name; updated in place.
        values: figures of the next batch; updated in place.
    """
    shares = {name for name in (*logged, *values) if name.startswith(LOGGED_TASK_SHARE)}
    batches = max((len(logged[name]) for name in shares if name in logged), default=0)
    for name in shares:
        values.setdefault(name, 0.0)
        logged[name].extend([0.0] * (batches - len(logged[name])))


def effective_samples(advantages: Tensor) -> float:
    """(Σ|A|)² / ΣA² as a share of the batch: 1 if all completions weigh the same, 1/B if a single one decides.

    Kish's effective sample size with |A| as the weight.
    """
    size = advantages.abs()
    squares = size.square().sum()
    return (size.sum().square() / squares / size.numel()).item() if squares > 0 else 0.0


def correlation(advantages: Tensor, lengths: Tensor, judged: Tensor) -> float:
    """Pearson correlation of advantage and completion length. 0 where one of the two is constant.

    Far from 0, the reward is about length: the policy learns to write longer (+) or shorter (−).
    """
    pairs = torch.stack([advantages[judged], lengths[judged].to(advantages)])
    if not has_spread(pairs).all():
        return 0.0
    # Not torch.corrcoef: its matrix product wakes the thread pool, which costs milliseconds where cores are busy.
    centered = center(pairs)
    covariance, variances = centered.prod(0).sum(), centered.square().sum(-1)
    return (covariance / variances.prod().sqrt()).clamp(-1, 1).item()


def turns_shared(steps: Steps, judged: Tensor) -> float:
    """Share of the turns that start from a state from which another turn of the group starts, too.

    The other turns have nobody to be compared with: they get the advantage of their completion alone.
    """
    keys, _ = steps.by_state(judged)
    _, counts = keys.unique(return_counts=True)
    return counts[counts > 1].sum().item() / max(1, len(keys))


def contributions(rewards: Rewards, *, normalizes_each: bool = False) -> Tensor:
    """Weighted, centered rewards, (P, G, K). NaN where a function abstained."""
    by_function = rewards.values.transpose(1, 2)
    centered = zscore(by_function, eps=0.0) if normalizes_each else center(by_function)
    return centered.transpose(1, 2) * rewards.weights


def _counting(rewards: Rewards) -> list[str]:
    """The functions whose weight is not 0."""
    return [name for name, weight in zip(rewards.names, rewards.weights.tolist(), strict=True) if weight != 0]
