"""Refuse hyper-parameters that cannot work, infinite rewards, and advantages that no loss could use."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import Estimator
from grpo_plus.advantages.rewards import Rewards, sample_rewards
from grpo_plus.registry import check_kinds


def check_keywords(
    estimator: Estimator,
    keywords: Mapping[str, Any],
    *,
    num_generations: int = 2,
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> None:
    """Refuse hyper-parameters that cannot work, before the run, by a try on a small made-up batch.

    Args:
        num_generations: the run's group size, in training or evaluation. k of `passk` must not exceed it.
        names: the run's reward functions. With None, `bounds` of `sa_mrpo` may name any reward.
        weights: the reward functions' weights. A weight only matters as 0 or not 0. With None every function counts.

    Raises:
        ValueError: an unknown keyword or a value out of range.
        UnknownRewardError: `bounds` names a reward that the run does not have.
    """
    estimator.check_taken(f"The advantage estimator {estimator.name!r}", keywords)
    bounds = keywords.get("bounds")
    names = names or list(bounds if isinstance(bounds, Mapping) else ()) or ["sample"]
    check_kinds(estimator.function, keywords)
    try:
        # Rewards at the bounds that the keywords give: any other reward would be refused for the wrong reason.
        low, high = keywords.get("low", 0.0), keywords.get("high", 1.0)
        sample = sample_rewards(num_generations, names, low, high, weights=weights)
        data: tuple[Any, ...] = (sample, {}) if estimator.stateful else (sample,)
        inspect.signature(estimator.function).bind(*data, **keywords)
        # A user's own function may need more than a made-up batch holds.
        if estimator.function.__module__.startswith("grpo_plus."):
            checked(f"advantage estimator {estimator.name!r}", estimator(sample, keywords, {}), sample)
    except TypeError as error:
        raise ValueError(str(error)) from error


def checked(source: str, advantages: Any, rewards: Rewards) -> Tensor:
    """Check advantages and clean them: float64 without gradient, 0 where nothing was judged and past each end.

    Args:
        source: what computed the advantages, for the message.
        advantages: (P, G), or (P, G, T) for an advantage per token. T is at least the length of the longest completion.

    Raises:
        ValueError: another shape, or a judged completion with an advantage that is not finite in float32.
    """
    _check_shape(source, advantages, rewards)
    counts = rewards.judged
    if advantages.dim() == 3:
        counts = counts.unsqueeze(-1)
        if rewards.spans is not None:
            counts = counts & (torch.arange(advantages.shape[2]) < rewards.spans.unsqueeze(-1))
    advantages = torch.where(counts, advantages.detach().cpu().double(), 0.0)
    _check_finite(source, advantages, rewards)
    return advantages


def check_state(name: str, state: Any) -> None:
    """Refuse, with a ValueError, a state that a checkpoint could not give back: it has to be JSON with string keys."""
    pending = [(repr(name), state)]
    while pending:
        where, value = pending.pop()
        if isinstance(value, Mapping):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise ValueError(
                    f"The state of the advantage estimator {where} has the key {odd[0]!r}, which a checkpoint would "
                    f"turn into a string. Write str({odd[0]!r})."
                )
            pending += [(f"{where}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(f"{where}[{index}]", item) for index, item in enumerate(value)]
        elif not (value is None or isinstance(value, (str, int, float))):
            raise ValueError(
                f"The state of the advantage estimator {where} is a {type(value).__name__}, which a checkpoint cannot "
                "hold. Store numbers, strings, lists and dictionaries: a tensor's .tolist() or .item()."
            )


def check_weights(weights: Iterable[Any], field: str = "reward_weights") -> list[float]:
    """The reward weights as floats.

    Args:
        field: what holds the weights, for the message.

    Raises:
        ValueError: a weight is no finite number. A NaN or an infinite weight would drop its reward without a word.
    """
    if isinstance(weights, (str, bytes, Mapping)) or not isinstance(weights, Iterable):
        raise ValueError(
            f"{field}={weights!r} is no list. Give one number per reward function, in their order: [1.0, 0.5]."
        )
    numbers = []
    for place, weight in enumerate(weights):
        try:
            number = float(weight)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"{field}[{place}]={weight!r} is no weight. Use finite numbers, and 0 for a reward that is only "
                "watched."
            )
        numbers.append(number)
    return numbers


def check_rewards(rewards: Rewards, completions: Sequence[Any] | None = None) -> None:
    """Refuse an infinite reward, with a ValueError that names the reward function and the completion.

    Args:
        completions: all B of them, to be shown.
    """
    infinite = rewards.values.isinf()
    if infinite.any():
        prompt, completion, k = (int(index) for index in infinite.nonzero()[0])
        row = prompt * rewards.values.shape[1] + completion
        shown = "" if completions is None else f", {str(completions[row])[:200]!r}"
        raise ValueError(
            f"The reward function {rewards.names[k]!r} returned {rewards.values[prompt, completion, k].item()} for "
            f"completion {completion} of group {prompt}{shown}. Rewards are float32, which ends at 3.4e38. Return a "
            "finite number, or None where it cannot judge."
        )


def check_trls_range(rewards: Rewards, scale_rewards: str, aggregation: str) -> None:
    """Refuse finite rewards for which TRL's own advantages overflow in float32, with a ValueError.

    TRL puts 0, or the largest number, in the place of an advantage that has become NaN or infinite.
    """
    total = rewards.total().unsqueeze(-1)  # (P, G, 1)
    summed = aggregation == "sum_then_normalize"
    parts = [(rewards.values * rewards.weights).abs(), total.abs().nansum(1)]
    scaled = total if summed else rewards.values
    deviations = scaled - scaled.nanmean(1, keepdim=True)
    if not summed or scale_rewards == "group":
        parts.append(deviations.square().nansum(1))
    elif scale_rewards == "batch":
        parts.append((total - total.nanmean()).square().nansum())
    largest = max(part.nan_to_num(0.0).max().item() for part in parts)
    if largest > torch.finfo(torch.float32).max:
        reward = rewards.values.abs().nan_to_num(0.0).flatten(0, 1).amax(0)  # (K,)
        k = int((reward * rewards.weights.abs()).argmax())
        raise ValueError(
            f"The reward function {rewards.names[k]!r} returned numbers as large as {reward[k].item():.3g}. With "
            f"scale_rewards={scale_rewards!r} TRL sums or squares them in float32, which ends at 3.4e38. Return "
            "smaller rewards, or set an advantage_estimator, which computes in float64."
        )


def _check_shape(source: str, advantages: Any, rewards: Rewards) -> None:
    prompts, generations = expected = tuple(rewards.values.shape[:2])
    found = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
    longest = 0 if rewards.spans is None else int(rewards.spans.max())
    per_token = isinstance(advantages, Tensor) and advantages.dim() == 3 and found[:2] == expected
    if found != expected and not (per_token and advantages.shape[2] >= longest):
        raise ValueError(
            f"The {source} returned {found} for rewards of {prompts} groups of {generations} completions; a tensor of "
            f"shape {expected} is needed, or for advantages per token ({prompts}, {generations}, T) with T of at least "
            f"{longest}, the tokens of the longest completion. {_describe_group(rewards, 0)}"
        )


def _check_finite(source: str, advantages: Tensor, rewards: Rewards) -> None:
    bad = ~advantages.float().isfinite()  # the loss computes in float32
    if bad.any():
        prompt, completion, *token = where = tuple(int(index) for index in bad.nonzero()[0])
        place = f"token {token[0]} of completion {completion}" if token else f"completion {completion}"
        raise ValueError(
            f"The {source} returned {advantages[where].item()} for {place} of group {prompt} "
            f"({int(bad.sum())} such values in the batch). Look for a division by zero in it. "
            f"{_describe_group(rewards, prompt)}"
        )


def _describe_group(rewards: Rewards, prompt: int) -> str:
    columns = (f"{name}: {rewards.values[prompt, :, k].tolist()}" for k, name in enumerate(rewards.names))
    return f"The rewards of group {prompt} were {'; '.join(columns)}."
