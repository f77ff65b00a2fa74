"""Numbers about one generation batch, logged under `advantages/`: which rewards and tasks drive the update, and how."""

import torch
from torch import Tensor

from grpo_plus.advantages.rewards import Rewards
from grpo_plus.reductions import RESOLUTION, centre, has_spread


def advantage_metrics(rewards: Rewards, advantages: Tensor, *, limit: float | None = None) -> dict[str, float]:
    """Everything below for one batch; a number that the batch cannot give (one reward, no lengths) is left out.

    Args:
        advantages: (P, G) as they reach the loss.
        limit: what the `clip` modifier limits |A| to, if it is on.
    """
    size = advantages.abs()
    metrics = {
        "frac_zero": (size == 0).double().mean().item(),
        "max_abs": size.max().item(),
        "effective_samples": effective_samples(advantages),
    }
    if limit is not None:
        # In float32, as they reach the loss, a clipped value is the limit to rounding.
        metrics["frac_clipped"] = (size >= limit * (1 - RESOLUTION)).double().mean().item()
    metrics |= {f"zero_spread/{name}": share for name, share in zero_spread(rewards).items()}
    if len(rewards.names) > 1:
        metrics |= {f"reward_share/{name}": share for name, share in reward_shares(rewards).items()}
        metrics["conflict"] = conflict(rewards)
    if rewards.tasks is not None:
        metrics |= {f"task_share/{task}": share for task, share in task_shares(rewards.tasks, advantages).items()}
    if rewards.lengths is not None:
        metrics["length_correlation"] = correlation(advantages, rewards.lengths, rewards.judged)
    return metrics


def zero_spread(rewards: Rewards) -> dict[str, float]:
    """Share of groups in which a reward function gave every completion the same reward, and so teaches nothing.

    "total" is the weighted sum. TRL logs one figure for all functions, and a flag of the batch instead of a share under
    scale_rewards="batch" and normalize_then_sum.
    """
    columns = {name: rewards.values[..., k] for k, name in enumerate(rewards.names)} | {"total": rewards.total()}
    return {name: (~has_spread(values)).double().mean().item() for name, values in columns.items()}


def reward_shares(rewards: Rewards) -> dict[str, float]:
    """How much of the weighted, centred reward comes from each function: Σᵢ|cᵢₖ| / Σᵢₗ|cᵢₗ|, cᵢₖ = wₖ(rᵢₖ − mean(rₖ)).

    One function near 1 drives the update alone, whatever the others' weights say.
    """
    size = _contributions(rewards).abs().nansum((0, 1))
    total = size.sum().clamp(min=torch.finfo(size.dtype).tiny)
    return dict(zip(rewards.names, (size / total).tolist(), strict=True))


def conflict(rewards: Rewards) -> float:
    """Share of judged completions that one reward function puts above its group's mean and another below."""
    contributions = _contributions(rewards)
    opposed = (contributions > 0).any(-1) & (contributions < 0).any(-1)
    return (opposed.sum() / rewards.judged.sum().clamp(min=1)).item()


def task_shares(tasks: tuple[str, ...], advantages: Tensor) -> dict[str, float]:
    """Each task's share of Σ|A|."""
    per_prompt = advantages.abs().sum(-1)
    total = per_prompt.sum().clamp(min=torch.finfo(per_prompt.dtype).tiny)
    shares = dict.fromkeys(sorted(set(tasks)), 0.0)
    for task, size in zip(tasks, (per_prompt / total).tolist(), strict=True):
        shares[task] += size
    return shares


def effective_samples(advantages: Tensor) -> float:
    """(Σ|A|)² / ΣA² as a share of the batch: 1 if all completions weigh the same, 1/N if a single one decides.

    Kish's effective sample size with |A| as the weight.
    """
    size = advantages.abs()
    squares = size.square().sum()
    return (size.sum().square() / squares / size.numel()).item() if squares > 0 else 0.0


def correlation(advantages: Tensor, lengths: Tensor, judged: Tensor) -> float:
    """Pearson correlation of advantage and completion length, 0 where one of them is constant.

    Far from 0, the reward is about length: the policy is being taught to write longer (+) or shorter (−).
    """
    pairs = torch.stack([advantages[judged], lengths[judged].to(advantages)])
    if not has_spread(pairs).all():
        return 0.0
    # Not torch.corrcoef: its matrix product wakes the thread pool, which costs milliseconds where cores are busy.
    centred = centre(pairs)
    covariance, variances = centred.prod(0).sum(), centred.square().sum(-1)
    return (covariance / variances.prod().sqrt()).clamp(-1, 1).item()


def _contributions(rewards: Rewards) -> Tensor:
    """(P, G, K) weighted, centred rewards; NaN where a function abstained."""
    return centre(rewards.values.transpose(1, 2)).transpose(1, 2) * rewards.weights
