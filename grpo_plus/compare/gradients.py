"""How much of a gradient is signal: each estimator's first gradient at the common start, on the same completions.

At the first update of a batch the policy is still the one that sampled it, all ratios are 1, and the gradient of every
clipped loss with a token mean is that of  sum_i A_i sum_t log p(token t of completion i) / tokens. The measurement is
shared by all variants of one estimator, with its keywords and modifiers. Losses and other fields do not enter.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_plus.advantages import Rewards, estimate
from grpo_plus.advantages.reductions import cosine
from grpo_plus.compare.comparison import StartSignal
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.trainer import GRPOPlusTrainer
from grpo_plus.trainer.probe import logps_of, sampled_batches

GROUPS, BATCHES = 64, 8  # groups aimed at, and the generation batches spent on them at most
NUMBERS = 2**31  # the most that are remembered: per estimator the sum of the gradients, and that of a group


class GradientSum:
    """Group gradients of one estimator, added up as they come.

    sum: (n,) of the gradients by the n trained weights. squares: the sum of their squared norms.
    """

    def __init__(self, size: int) -> None:
        self.sum = torch.zeros(size)
        self.squares = 0.0
        self.count = 0

    def add(self, gradient: Tensor | None) -> None:
        """Count one group; None: its gradient is 0."""
        self.count += 1
        if gradient is not None:
            self.sum += gradient
            self.squares += gradient.double().square().sum().item()


def signal_to_noise(gradients: GradientSum) -> float:
    """The share of a single group's gradient that is common to all groups, as a ratio of squared norms.

        SNR = (|m|² - v/n) / v,   m = mean of g_i,   v = sum_i |g_i - m|² / (n - 1)

    over the gradients g_1 .. g_n of n groups. v is the trace of the groups' covariance. |m|² alone is too large by v/n
    on average, so the numerator subtracts v/n, and is cut off at 0. The mean gradient of k groups has k times this
    ratio. With k = 1 / SNR groups, signal and noise are equally large. That k is the "simple noise scale" of
    McCandlish et al., "An Empirical Model of Large-Batch Training" (https://huggingface.co/papers/1812.06162), Eq. 2.9
    and appendix A.1. The ratio does not depend on the size of the advantages. A normalization over the batch makes the
    groups of the batch slightly dependent, which the ratio ignores. NaN where there is no gradient.
    """
    count = gradients.count
    mean = (gradients.sum.double() / max(count, 1)).square().sum().item()
    noise = (gradients.squares - count * mean) / max(count - 1, 1)
    return max(mean - noise / count, 0.0) / noise if noise > 0 else math.nan


def measure_start(trainer: GRPOPlusTrainer, configs: Mapping[str, GRPOPlusConfig]) -> StartSignal:
    """Sample from the trainer's model and see what each configuration's estimator makes of it.

    Args:
        trainer: one that has not trained.
        configs: by label; those of the same estimator share the work.
    """
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    size = sum(weight.numel() for weight in weights)
    estimators = {label: _StartEstimator(config) for label, config in configs.items()}
    distinct = {estimator.key: estimator for estimator in estimators.values()}
    needed = 2 * len(distinct) * size
    skipped = f"{needed:.1e} numbers would have to be kept, over the limit of {NUMBERS:.1e}" if needed > NUMBERS else ""
    totals = {key: GradientSum(0 if skipped else size) for key in distinct}
    groups = 0
    for rewards, rows in sampled_batches(trainer, _batches(trainer)):
        for estimator in distinct.values():
            estimator.take(rewards)
        groups += len(rewards.values)
        if not rows:
            skipped = "images: the gradients at the start are computed for rows of text alone"
        if not skipped:
            _add_gradients(trainer, weights, rows, distinct, totals)
    if groups == 0:
        skipped = "the data set is smaller than a generation batch"
    live = {label: estimator for label, estimator in estimators.items() if not estimator.refused}
    measured = {} if skipped else live
    return StartSignal(
        advantages={label: estimator.advantages for label, estimator in live.items()},
        snr={label: _number(signal_to_noise(totals[estimator.key])) for label, estimator in measured.items()},
        cosine={
            first: {
                second: _number(cosine(totals[one.key].sum, totals[other.key].sum))
                for second, other in measured.items()
            }
            for first, one in measured.items()
        },
        groups=groups,
        refused={label: estimator.refused for label, estimator in estimators.items() if estimator.refused},
        skipped=skipped,
    )


def _batches(trainer: GRPOPlusTrainer) -> int:
    groups = (trainer.args.generation_batch_size or 1) // trainer.num_generations
    return min(BATCHES, -(-GROUPS // max(groups, 1)))


class _StartEstimator:
    """A configuration's estimator at the start: what it made of the batches so far."""

    def __init__(self, config: GRPOPlusConfig) -> None:
        self.config = config
        self.key = str((config.advantage_estimator, config.advantage_kwargs, config.advantage_modifiers))
        self.advantages: list[float] = []
        self.newest: Tensor | None = None
        self.refused = ""

    def take(self, rewards: Rewards) -> None:
        """Compute the advantages of one batch; without memory, as in a first step."""
        config: Any = self.config
        self.newest = None
        if self.refused:
            return
        try:
            self.newest = estimate(
                config.advantage_estimator, rewards, config.advantage_kwargs, modifiers=config.advantage_modifiers
            )
        # Any error of the user's estimator: its arms will say the same, and the others must not pay for it.
        except Exception as error:
            self.refused = f"{type(error).__name__}: {error}"
        else:
            self.advantages += rewards.per_completion(self.newest).flatten().tolist()


def _add_gradients(
    trainer: GRPOPlusTrainer,
    weights: list[Tensor],
    rows: Mapping[str, Tensor],
    estimators: Mapping[str, _StartEstimator],
    totals: Mapping[str, GradientSum],
) -> None:
    size = trainer.num_generations
    groups = len(rows["completion_mask"]) // size
    tokens = rows["completion_mask"].sum().item() / groups  # of a group, on average: the mean is that of a token mean
    newest = {key: estimator.newest for key, estimator in estimators.items() if estimator.newest is not None}
    for group in range(groups):
        part = {name: values[group * size : (group + 1) * size] for name, values in rows.items()}
        advantages = {key: values[group] / tokens for key, values in newest.items()}
        for key, gradient in _group_gradients(trainer, weights, part, advantages).items():
            totals[key].add(gradient)


def _group_gradients(
    trainer: GRPOPlusTrainer, weights: list[Tensor], rows: Mapping[str, Tensor], advantages: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """The gradient of one group under each estimator's advantages, None where all are 0.

    As many rows at once as in training: a whole group could take more memory than the training does.
    """
    found: dict[str, Tensor | None] = dict.fromkeys(advantages)
    step = trainer.args.per_device_train_batch_size
    for first in range(0, trainer.num_generations, step):
        some = slice(first, first + step)
        logps, mask = logps_of(trainer, {name: values[some] for name, values in rows.items()})
        for key, values in advantages.items():
            if not values[some].any():
                continue
            per_token = _per_token(values[some].to(logps), logps.shape[1])
            loss = (per_token * logps * mask).sum()
            parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            gradient = torch.cat([_flat(part, weight) for part, weight in zip(parts, weights, strict=True)])
            sum_so_far = found[key]
            found[key] = gradient if sum_so_far is None else sum_so_far.add_(gradient)
    return found


def _per_token(advantages: Tensor, tokens: int) -> Tensor:
    """(G,) or (G, T') -> (G, 1) or (G, T): past the end of the longest completion the mask is 0 anyway."""
    if advantages.dim() == 1:
        return advantages.unsqueeze(1)
    return torch.nn.functional.pad(advantages, (0, tokens - advantages.shape[1]))


def _flat(gradient: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros(weight.numel()) if gradient is None else gradient.detach().float().cpu().flatten()


def _number(value: float) -> float | None:
    """The value for a file of ours: JSON has no NaN."""
    return None if math.isnan(value) else value
