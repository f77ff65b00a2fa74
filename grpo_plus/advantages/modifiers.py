"""Modifiers: changes of rewards or advantages that compose with any estimator, written as data.

    modifiers = {"gate": {"by": "correctness"}, "difficulty": {"gamma": 0.5}, "clip": {"max": 5.0}}

A reward modifier (`gate`, `pods`, `gfpo`, `alp`, `kl_in_reward`) changes the rewards that the estimator sees. An
advantage modifier (`difficulty`, `filter_zero_std`, `clip`) changes the advantages that the estimator returned, and
sees the same rewards as the estimator. `apply_to_rewards` and `apply_to_advantages` run the modifiers in the order
given.

To add a modifier, write a function that refuses wrong values by itself, and name it in one of the two tables at the
end. A reward modifier is (Rewards, *, keywords) -> Rewards. An advantage modifier is (Rewards, advantages, *, keywords)
-> advantages, for (P, G) and (P, G, T) alike.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_plus.advantages.kl_penalty import kl_in_reward
from grpo_plus.advantages.reductions import RESOLUTION, has_spread, mean
from grpo_plus.advantages.rewards import Rewards, sample_rewards
from grpo_plus.advantages.selection import gfpo, pods
from grpo_plus.registry import check_kinds, check_taken, suggestion

Modifiers = Mapping[str, Mapping[str, Any]]
"""Names of `MODIFIERS` with their keywords, in order: `{"clip": {"max": 5.0}}`."""


def gate(rewards: Rewards, *, by: str, at_least: float = 1.0, gated: Sequence[str] | None = None) -> Rewards:
    """Count a reward only where another reward passes: (correct and short) pays, (wrong and short) does not.

        r'ᵢₖ = rᵢₖ if rᵢ,by ≥ at_least, else 0        for every gated k

    Ungated, an easy reward is earned first and alone: a length bonus gives spread to a group in which every answer is
    wrong. Where the `by` function abstained (returned None), the other rewards count as they are.
    Liu et al., "GDPO" (https://huggingface.co/papers/2601.05242), conditioned rewards.

    Args:
        by: the reward that has to pass.
        at_least: smallest value of `by` that passes.
        gated: the rewards that count only where `by` passes. None gates every reward but `by`.
    """
    _check_number("at_least", at_least)
    gating = rewards.index(by)
    names = [name for name in rewards.names if name != by] if gated is None else gated
    if isinstance(names, str) or by in names:
        raise ValueError(f"gated={gated!r} must be a list of rewards other than by={by!r}.")
    columns = torch.zeros(len(rewards.names), dtype=torch.bool)
    columns[[rewards.index(name) for name in names]] = True
    verdict = rewards.values[..., gating]
    closed = ~(_passes(verdict, at_least) | verdict.isnan())
    # An abstention stays NaN: 0 would be a judgment.
    shut = closed.unsqueeze(-1) & columns & ~rewards.values.isnan()
    return replace(rewards, values=rewards.values.masked_fill(shut, 0.0))


def alp(rewards: Rewards, *, by: str, beta: float, max_length: int, at_least: float = 1.0) -> Rewards:
    """Take a penalty per token from a reward, the higher the more completions of the group succeed: adaptive length.

        r'ᵢ = rᵢ − beta · max(p, 1/G) · |yᵢ| / max_length        p: share of the group's judged completions that succeed

    A prompt that is always solved pays the full penalty, and its answers get short. A prompt that is hardly ever solved
    pays 1/G of it, and its answers may be long. Completions of a group that is all right or all wrong differ by length,
    so such a group trains, too. Modifiers after this one see the penalized reward.
    Xiang et al., "Just Enough Thinking" (https://huggingface.co/papers/2506.05256), known to us from a review. There r
    is 1 or 0, and N stands for max_length.

    Args:
        by: the reward that says what a success is, and that pays.
        beta: what a completion of max_length tokens pays in a group that always succeeds. 0 or more.
        max_length: unit of the length, in tokens, such as max_completion_length.
        at_least: smallest value of `by` that is a success.
    """
    _check_number("beta", beta, least=0)
    _check_number("max_length", max_length, above=0)
    _check_number("at_least", at_least)
    column = rewards.index(by)
    verdict = rewards.values[..., column]
    judged = ~verdict.isnan()
    solved = mean(_passes(verdict, at_least).double().where(judged, torch.nan))
    rate = solved.maximum(1 / judged.sum(-1, keepdim=True).clamp(min=1))
    values = rewards.values.clone()
    values[..., column] = verdict - beta * rate * rewards.tokens() / max_length
    return replace(rewards, values=values)


def difficulty(
    rewards: Rewards, advantages: Tensor, *, gamma: float = 1.0, by: str | None = None, at_least: float = 1.0
) -> Tensor:
    """Weight a prompt by a power of its failure rate.

        A'ᵢ = (1 − p)^gamma · Aᵢ        p: share of the group's judged completions that succeed

    Prompts that are nearly always solved only sharpen what the policy does anyway. Their updates shrink.
    Plyusov et al., "F-GRPO" (https://huggingface.co/papers/2602.06717), where rewards are binary. A graded reward is a
    success from `at_least` on. The paper tunes gamma; the default here is ours.

    Args:
        gamma: 0 or more. 0 changes nothing.
        by: the reward that says what a success is. None means the weighted sum.
        at_least: smallest value that is a success.
    """
    _check_number("gamma", gamma, least=0)
    _check_number("at_least", at_least)
    judged = rewards.total() if by is None else rewards.values[..., rewards.index(by)]
    success = _passes(judged, at_least).double().where(~judged.isnan(), torch.nan)
    failing = 1 - mean(success).nan_to_num()
    return advantages * _for_each(failing**gamma, advantages)


def filter_zero_std(rewards: Rewards, advantages: Tensor, *, by: str) -> Tensor:
    """Drop the groups in which one named reward has no spread, whatever the other rewards say.

        A'ᵢ = Aᵢ if the rewards rⱼ,by of the group differ, else 0

    In a group without a correct answer, a bonus for format or length still makes differences, and a division by the
    group's std blows up these differences to full size. A filter on the weighted sum would not see such a group. A
    group that the `by` function did not judge at all (returned None throughout) stays as it is.
    Yu et al., "DAPO" (https://huggingface.co/papers/2503.14476), dynamic sampling, which draws new prompts instead.

    Args:
        by: the reward that has to differ.
    """
    verdict = rewards.values[..., rewards.index(by)]
    kept = has_spread(verdict) | verdict.isnan().all(-1, keepdim=True)
    return advantages.where(_for_each(kept, advantages), 0.0)


def clip(rewards: Rewards, advantages: Tensor, *, max: float) -> Tensor:
    """Limit the size of an advantage.

        A'ᵢ = min(max(Aᵢ, −max), max)

    For estimators that can return large values: `maxrl` and `median_mad` in large groups, `dr_grpo` with an outlier
    among the rewards. Choose a `max` that seldom acts, because the advantages of a clipped group no longer sum to zero.
    A common practice without a paper of its own.

    Args:
        max: the largest |A|, above 0.
    """
    _check_number("max", max, above=0)
    return advantages.clamp(-max, max)


REWARD_MODIFIERS: dict[str, Callable[..., Rewards]] = {
    "gate": gate,
    "pods": pods,
    "gfpo": gfpo,
    "alp": alp,
    "kl_in_reward": kl_in_reward,
}
ADVANTAGE_MODIFIERS: dict[str, Callable[..., Tensor]] = {
    "difficulty": difficulty,
    "filter_zero_std": filter_zero_std,
    "clip": clip,
}
MODIFIERS: dict[str, Callable[..., Any]] = {**REWARD_MODIFIERS, **ADVANTAGE_MODIFIERS}
"""Every modifier by its name. They go with any estimator."""
LENGTH_MODIFIERS = frozenset({"gfpo", "alp"})
"""The modifiers that read the lengths of the completions."""


def apply_to_rewards(rewards: Rewards, modifiers: Modifiers) -> Rewards:
    """Run every reward modifier, in the order given. The estimator sees the result."""
    for name, keywords in modifiers.items():
        if name in REWARD_MODIFIERS:
            rewards = REWARD_MODIFIERS[name](rewards, **keywords)
    return rewards


def apply_to_advantages(rewards: Rewards, advantages: Tensor, modifiers: Modifiers) -> Tensor:
    """Run every advantage modifier on the estimator's advantages, in the order given."""
    for name, keywords in modifiers.items():
        if name in ADVANTAGE_MODIFIERS:
            advantages = ADVANTAGE_MODIFIERS[name](rewards, advantages, **keywords)
    return advantages


def clip_limits(rewards: Rewards, modifiers: Modifiers) -> Tensor | None:
    """Largest |A| that `clip` lets through for each completion, (P, G), after the later modifiers. None without `clip`.

    Args:
        rewards: the rewards that the estimator saw.
    """
    names = list(modifiers)
    if "clip" not in names:
        return None
    later = {name: modifiers[name] for name in names[names.index("clip") + 1 :]}
    limit = torch.full_like(rewards.values[..., 0], modifiers["clip"]["max"])
    return apply_to_advantages(rewards, limit, later)


def check_modifiers(
    modifiers: Modifiers, names: Sequence[str] | None = None, *, num_generations: int | None = None
) -> None:
    """Refuse, before the run, unknown names, unknown or missing keywords, and values out of range.

    Args:
        names: the run's reward functions. With None, `by` of a modifier may name any reward.
        num_generations: the run's group size in training. Evaluation may have smaller groups; `pods` and `gfpo` keep
            them whole.

    Raises:
        ValueError: a modifier cannot work.
        UnknownRewardError: a modifier names a reward that the run does not have.
    """
    for name, keywords in modifiers.items():
        if name not in MODIFIERS:
            raise ValueError(f"Unknown advantage modifier {name!r}.{suggestion(name, MODIFIERS)}")
        if not isinstance(keywords, Mapping):
            raise ValueError(f"The advantage modifier {name!r} takes a table of keywords, not {keywords!r}.")
        _check_keywords(name, keywords)
        check_kinds(MODIFIERS[name], keywords)
        sample = sample_rewards(names=_mentioned(keywords) if names is None else names)
        try:
            apply_to_advantages(sample, torch.zeros(2, 2).double(), {name: keywords})
            apply_to_rewards(sample, {name: keywords})
        except TypeError as error:
            raise ValueError(f"{dict(keywords)} does not fit the advantage modifier {name!r}: {error}") from error
        if num_generations is not None and keywords.get("keep", 0) > num_generations:
            raise ValueError(
                f"keep={keywords['keep']} does not fit: groups have num_generations={num_generations} completions, so "
                "nothing would be dropped. Use a smaller number."
            )


def _check_keywords(name: str, keywords: Mapping[str, Any]) -> None:
    parameters = inspect.signature(MODIFIERS[name]).parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    check_taken(f"The advantage modifier {name!r}", keywords, known)
    for keyword, parameter in known.items():
        if parameter.default is parameter.empty and keyword not in keywords:
            raise ValueError(f"The advantage modifier {name!r} needs the keyword {keyword!r}.")


def _mentioned(keywords: Mapping[str, Any]) -> list[str]:
    """Rewards that the keywords name. A stand-in where the keywords name none."""
    gated = keywords.get("gated")
    named = [keywords.get("by"), *(gated if isinstance(gated, Sequence) else [])]
    return list(dict.fromkeys(name for name in named if isinstance(name, str))) or ["sample"]


def _for_each(per_group: Tensor, advantages: Tensor) -> Tensor:
    """(P, 1) as it is, or (P, 1, 1) for advantages per token."""
    return per_group.unsqueeze(-1) if advantages.dim() == 3 else per_group


def _passes(values: Tensor, at_least: float) -> Tensor:
    # A reward of 0.7 is 0.699999988 in TRL's float32, and has to pass 0.7.
    return values >= at_least - RESOLUTION * abs(at_least)


def _check_number(keyword: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Refuse a value that is no number, too small or not finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value <= above:
        wanted = f" above {above}" if above > -math.inf else f" from {least}" if least > -math.inf else ""
        raise ValueError(f"{keyword}={value!r} does not fit: a finite number{wanted} is needed.")
