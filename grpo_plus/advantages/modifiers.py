"""Modifiers: what composes with any estimator, given as data and not as estimators of their own.

    modifiers = {"gate": {"by": "correctness"}, "difficulty": {"gamma": 0.5}, "clip": {"max": 5.0}}

A reward modifier (`gate`, `pods`) changes what the estimator sees; an advantage modifier (`difficulty`,
`filter_zero_std`, `clip`) changes what it returned, and sees the rewards as the estimator saw them. `apply_to_rewards`
and `apply_to_advantages` run them in the order given.

To add one, write a function of (Rewards, *, keywords) -> Rewards or (Rewards, advantages, *, keywords) -> advantages,
(P, G) and (P, G, T) alike, that refuses wrong values by itself, and name it in one of the two tables at the end.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_plus.advantages.reductions import RESOLUTION, has_spread, mean
from grpo_plus.advantages.rewards import Rewards, sample_rewards
from grpo_plus.advantages.selection import pods
from grpo_plus.registry import suggestion

Modifiers = Mapping[str, Mapping[str, Any]]


def gate(rewards: Rewards, *, by: str, at_least: float = 1.0, gated: Sequence[str] | None = None) -> Rewards:
    """Count a reward only where another reward passes: (correct and short) pays, (wrong and short) does not.

    r'ᵢₖ = rᵢₖ if rᵢ,by ≥ at_least, else 0        for every gated k

    An easy reward is otherwise earned first and alone: a length bonus makes a group live in which every answer is
    wrong. Liu et al., "GDPO" (https://huggingface.co/papers/2601.05242), conditioned rewards. Where the `by` function
    abstained (returned None) there is nothing to gate by, and the rewards count as they are.

    Args:
        by: the reward that has to pass.
        at_least: from which value on it passes.
        gated: the rewards that count only then; all but `by` where None.
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
    # An abstention stays one: 0 would make it a judgement.
    shut = closed.unsqueeze(-1) & columns & ~rewards.values.isnan()
    return replace(rewards, values=rewards.values.masked_fill(shut, 0.0))


def difficulty(
    rewards: Rewards, advantages: Tensor, *, gamma: float = 1.0, by: str | None = None, at_least: float = 1.0
) -> Tensor:
    """Weight a prompt by how often it fails, to a power.

    A'ᵢ = (1 − p)^gamma · Aᵢ        p: share of the group's judged completions that succeed

    Prompts that are nearly always solved sharpen the policy on what it does anyway; their updates shrink.
    Plyusov et al., "F-GRPO" (https://huggingface.co/papers/2602.06717), where p is that of binary rewards. For graded
    ones a success is a reward of at least `at_least`; gamma is the paper's to tune, and its default here is ours.

    Args:
        gamma: from 0, which changes nothing.
        by: the reward that says what a success is; the weighted sum where None.
        at_least: from which value on a completion succeeds.
    """
    _check_number("gamma", gamma, least=0)
    _check_number("at_least", at_least)
    judged = rewards.total() if by is None else rewards.values[..., rewards.index(by)]
    success = _passes(judged, at_least).double().where(~judged.isnan(), torch.nan)
    failing = 1 - mean(success).nan_to_num()
    return advantages * _for_each(failing**gamma, advantages)


def filter_zero_std(rewards: Rewards, advantages: Tensor, *, by: str) -> Tensor:
    """Drop the groups in which one reward, named, has no spread, whatever the other rewards say.

    A'ᵢ = Aᵢ if the rewards rⱼ,by of the group differ, else 0

    In a group without a correct answer a bonus for format or length still makes differences, and scaling by the
    group's std blows them up to full size. Filtering on the weighted sum does not see that; this does.
    Yu et al., "DAPO" (https://huggingface.co/papers/2503.14476), dynamic sampling, which draws new prompts instead. A
    group that the `by` function did not judge at all (returned None throughout) is left as it is.

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
    among the rewards. Choose `max` so that it seldom acts: a group of clipped advantages no longer sums to zero. A
    common practice without a paper of its own.

    Args:
        max: the largest |A|, above 0.
    """
    _check_number("max", max, above=0)
    return advantages.clamp(-max, max)


REWARD_MODIFIERS: dict[str, Callable[..., Rewards]] = {"gate": gate, "pods": pods}
ADVANTAGE_MODIFIERS: dict[str, Callable[..., Tensor]] = {
    "difficulty": difficulty,
    "filter_zero_std": filter_zero_std,
    "clip": clip,
}
MODIFIERS: dict[str, Callable[..., Any]] = {**REWARD_MODIFIERS, **ADVANTAGE_MODIFIERS}


def apply_to_rewards(rewards: Rewards, modifiers: Modifiers) -> Rewards:
    """The rewards that the estimator sees: every reward modifier in turn, in the order given."""
    for name, keywords in modifiers.items():
        if name in REWARD_MODIFIERS:
            rewards = REWARD_MODIFIERS[name](rewards, **keywords)
    return rewards


def apply_to_advantages(rewards: Rewards, advantages: Tensor, modifiers: Modifiers) -> Tensor:
    """What becomes of an estimator's advantages: every advantage modifier in turn, in the order given."""
    for name, keywords in modifiers.items():
        if name in ADVANTAGE_MODIFIERS:
            advantages = ADVANTAGE_MODIFIERS[name](rewards, advantages, **keywords)
    return advantages


def clip_limits(rewards: Rewards, modifiers: Modifiers) -> Tensor | None:
    """(P, G) the |A| at which `clip` stopped each completion, as the modifiers after it left it; None without `clip`.

    Args:
        rewards: as the estimator saw them.
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
    """Refuse what cannot work before the run: unknown names and keywords, missing ones, and values out of range.

    Args:
        names: the run's reward functions. Where None, a modifier's `by` may name anything.
        num_generations: the run's own in training. Evaluation may have smaller groups, which `pods` keeps whole.

    Raises:
        ValueError: something is wrong; UnknownRewardError, a subclass, if it is the name of a reward.
    """
    for name, keywords in modifiers.items():
        if name not in MODIFIERS:
            raise ValueError(f"Unknown advantage modifier {name!r}.{suggestion(name, MODIFIERS)}")
        if not isinstance(keywords, Mapping):
            raise ValueError(f"The advantage modifier {name!r} takes a table of keywords, not {keywords!r}.")
        _check_keywords(name, keywords)
        sample = sample_rewards(names=_mentioned(keywords) if names is None else names)
        try:
            apply_to_advantages(sample, torch.zeros(2, 2).double(), {name: keywords})
            apply_to_rewards(sample, {name: keywords})
        except TypeError as error:
            raise ValueError(f"{dict(keywords)} does not fit the advantage modifier {name!r}: {error}") from error
        if name == "pods" and num_generations is not None and keywords["keep"] > num_generations:
            raise ValueError(
                f"keep={keywords['keep']} does not fit: groups have num_generations={num_generations} completions, so "
                "nothing would be dropped. Use a smaller number."
            )


def _check_keywords(name: str, keywords: Mapping[str, Any]) -> None:
    parameters = inspect.signature(MODIFIERS[name]).parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    for keyword in keywords:
        if keyword not in known:
            raise ValueError(
                f"The advantage modifier {name!r} takes no keyword {keyword!r}.{suggestion(keyword, known)}"
            )
    for keyword, parameter in known.items():
        if parameter.default is parameter.empty and keyword not in keywords:
            raise ValueError(f"The advantage modifier {name!r} needs the keyword {keyword!r}.")


def _mentioned(keywords: Mapping[str, Any]) -> list[str]:
    """The rewards that keywords name; any one where they name none."""
    gated = keywords.get("gated")
    named = [keywords.get("by"), *(gated if isinstance(gated, Sequence) else [])]
    return list(dict.fromkeys(name for name in named if isinstance(name, str))) or ["sample"]


def _for_each(per_group: Tensor, advantages: Tensor) -> Tensor:
    """(P, 1), with a further axis where the advantages are those of tokens."""
    return per_group.unsqueeze(-1) if advantages.dim() == 3 else per_group


def _passes(values: Tensor, at_least: float) -> Tensor:
    # A reward of 0.7 is 0.699999988 in TRL's float32, and has to pass 0.7.
    return values >= at_least - RESOLUTION * abs(at_least)


def _check_number(keyword: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Refuse what is no number, too small or not finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value <= above:
        wanted = f" above {above}" if above > -math.inf else f" from {least}" if least > -math.inf else ""
        raise ValueError(f"{keyword}={value!r} does not fit: a finite number{wanted} is needed.")
