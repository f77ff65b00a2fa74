"""How completions are trained that the policy did not draw, and whose log-probabilities nobody knows.

Such a completion has no importance ratio. In the place of the ratio stands a weight of each token, a function of the
probability p that the policy gives the token:

    loss = −sg(wₜ) A log πₜ

To add a way, write a function (logps, step, *, keywords) -> Weights that refuses wrong values by itself, and name the
function in `DEMONSTRATION_LOSSES`.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_plus.registry import check_kinds, check_taken, suggestion


class Weights(NamedTuple):
    """Weights of a micro-batch.

    Attributes:
        tokens: (B, T) of demonstrated tokens.
        demonstrated: factor of all demonstrations.
        drawn: factor of the completions that the policy drew.
    """

    tokens: Tensor
    demonstrated: float = 1.0
    drawn: float = 1.0


def imitation(logps: Tensor, step: int) -> Weights:
    """Treat a demonstration as if the policy had drawn it: w = 1.

    The gradient is A ∇log π. A demonstration that is better than its group is imitated, a worse one is avoided. Tokens
    that the policy finds improbable have the largest gradients.
    """
    return Weights(torch.ones_like(logps))


def luffy(logps: Tensor, step: int, *, gamma: float = 0.1) -> Weights:
    """Shape the policy's probability: the loss is −A f(p), f(p) = p / (p + γ), so that w = γp / (p + γ)².

    The plain off-policy term −A p gives tokens of low probability next to no gradient, and imitation gives them nearly
    all. Here the weight is largest at p = γ. As in the paper, a demonstration has no clip, and its group's advantages
    count the demonstration.
    Yan et al., "Learning to Reason under Off-Policy Guidance" (https://huggingface.co/papers/2504.14945).

    Args:
        gamma: the probability with the largest weight, above 0. The authors take 0.1.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma!r} must be above 0; the authors take 0.1.")
    probabilities = logps.exp()
    return Weights(gamma * probabilities / (probabilities + gamma).square())


def chord(
    logps: Tensor,
    step: int,
    *,
    mu: float = 0.1,
    mu_end: float | None = None,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    phi: bool = True,
) -> Weights:
    """Add supervised fine-tuning to GRPO: (1 − μ) L_GRPO + μ L_SFT, with w = φ(p) = p (1 − p) or 1.

    A demonstration has no advantage, whatever its reward, and is no part of its group's baseline. Each of the two
    losses is a mean over its own completions of the batch. φ leaves out what the policy knows already, and what is too
    far from the policy. Without φ, let μ decay: the authors go from 0.9 to 0.05 in 200 steps.
    Zhang et al., "On-Policy RL Meets Off-Policy Experts" (https://huggingface.co/papers/2508.11408). Schedule and
    defaults are those of the authors' code.

    Args:
        mu: the weight μ after the warm-up, from 0 to 1.
        mu_end: μ after the decay. None: μ stays.
        warmup_steps: optimizer steps in which μ rises from 0, in a line.
        decay_steps: optimizer steps after the warm-up in which μ falls to `mu_end`, along a cosine.
        phi: whether tokens are weighed by φ.
    """
    end = mu if mu_end is None else mu_end
    if not (0 <= mu <= 1 and 0 <= end <= 1):
        raise ValueError(f"mu={mu!r}, mu_end={mu_end!r} must be shares from 0 to 1, such as 0.1.")
    if not (warmup_steps >= 0 and decay_steps >= 0):
        raise ValueError(f"warmup_steps={warmup_steps!r}, decay_steps={decay_steps!r} must be 0 or more.")
    if bool(decay_steps) is (mu_end is None):
        raise ValueError(f"mu_end={mu_end!r} and decay_steps={decay_steps!r} belong together, such as 0.05 and 200.")
    share = _annealed(step, mu, end, warmup_steps, decay_steps)
    probabilities = logps.exp()
    weights = probabilities * (1 - probabilities) if phi else torch.ones_like(logps)
    return Weights(weights, share, 1 - share)


def _annealed(step: int, peak: float, end: float, warmup_steps: int, decay_steps: int) -> float:
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return end
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


DEMONSTRATION_LOSSES = {"imitation": imitation, "luffy": luffy, "chord": chord}
"""What `demonstration_loss` takes."""
BY_DEFAULT: dict[str, dict[str, Any]] = {"imitation": {}}
"""What an unset `demonstration_loss` means."""
UNJUDGED = ("chord",)
"""Of these, the ways in which a demonstration has no advantage."""


def demonstration_weights(chosen: Mapping[str, Mapping[str, Any]], logps: Tensor, step: int) -> Weights:
    """The weights under a way that `check_demonstration_loss` has passed, such as {"luffy": {"gamma": 0.1}}."""
    ((name, keywords),) = chosen.items()
    return DEMONSTRATION_LOSSES[name](logps, step, **keywords)


def differ_by_token(chosen: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether two tokens of a completion can weigh differently."""
    weights = demonstration_weights(chosen, torch.tensor([[-0.1, -1.0]]), 0).tokens
    return bool(weights[0, 0] != weights[0, 1])


def check_demonstration_loss(chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse, with a ValueError, anything but one known way with keywords that the way takes."""
    names = list(chosen)
    if len(names) != 1 or not all(isinstance(keywords, Mapping) for keywords in chosen.values()):
        raise ValueError(
            f"demonstration_loss={dict(chosen)} is not one name with its keywords, such as "
            '{"luffy": {"gamma": 0.1}}.'
        )
    name, known = names[0], list(DEMONSTRATION_LOSSES)
    if name not in known:
        raise ValueError(f"Unknown demonstration_loss {name!r}.{suggestion(str(name), known)}")
    way, keywords = DEMONSTRATION_LOSSES[name], chosen[name]
    check_taken(f"demonstration_loss: {name!r}", keywords, list(inspect.signature(way).parameters)[2:])
    try:
        check_kinds(way, keywords)
        demonstration_weights(chosen, torch.tensor([[-1.0]]), 0)
    except ValueError as error:
        raise ValueError(f"demonstration_loss={dict(chosen)} does not fit: {error}") from error
