"""Advantage estimators: what one promises, and the registry of all of them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from grpo_plus.advantages.rewards import Rewards
from grpo_plus.registry import Described, Registry, suggestion

Scope = Literal["group", "batch"]
State = dict[str, Any]
"""What a stateful estimator remembers from batch to batch. A checkpoint holds it."""
Domain = Literal["real", "unit", "binary"]


@dataclass(frozen=True)
class Estimator(Described):
    """An advantage estimator and its promises. The property tests hold every estimator to its promises.

    `register` takes the attributes after `function` as keywords. Their defaults promise nothing.

    Attributes:
        name: the name to write in `advantage_estimator`.
        function: (Rewards, *, hyper-parameters) -> (P, G) advantages, or (P, G, T) for an advantage per token.
        scope: "group" if a prompt's advantages depend on its own completions alone, "batch" if on the whole batch.
        shift_invariant: adding a constant to every reward changes nothing.
        scale_invariant: multiplying every reward by a positive constant changes nothing (up to eps).
        sums_to_zero: the advantages of a group sum to zero.
        multi_reward: each reward function's column matters by itself. A single weighted sum would not be enough.
        normalizes_each: each reward function is divided by its own spread before the sum. Its unit does not matter.
        domain: which weighted sums are allowed: any ("real"), 0 to 1 ("unit"), or only 0 and 1 ("binary").
        needs_lengths: the function reads the completions' lengths.
        trains_without_spread: a group of equal rewards may get advantages other than 0.
        stateful: the function reads and updates a dictionary, which it takes after the rewards. The dictionary must be
            JSON with strings as keys.
        needs_prompts: the function recognizes a prompt that an earlier batch has shown.
        needs_steps: the function reads rewards of the completions' steps and returns an advantage per token.
        needs_turns: the steps are the turns of a tool loop or an environment, with the states that they start from.
    """

    name: str
    function: Callable[..., Tensor]
    _: KW_ONLY
    scope: Scope = "batch"
    shift_invariant: bool = False
    scale_invariant: bool = False
    sums_to_zero: bool = False
    multi_reward: bool = False
    normalizes_each: bool = False
    domain: Domain = "real"
    needs_lengths: bool = False
    trains_without_spread: bool = False
    stateful: bool = False
    needs_prompts: bool = False
    needs_steps: bool = False
    needs_turns: bool = False

    def __call__(self, rewards: Rewards, keywords: Mapping[str, Any], state: State) -> Tensor:
        """Advantages by the function. A stateful function updates `state`."""
        data = (rewards, state) if self.stateful else (rewards,)
        return self.function(*data, **keywords)

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The function's parameters after the rewards and the state."""
        return super().parameters[1:] if self.stateful else super().parameters


ESTIMATORS = Registry("advantage estimator", "grpo_plus.advantages", Estimator)
"""Every estimator by its name, `ESTIMATORS["rloo"]`. A dotted path to a function is a name, too."""
register = ESTIMATORS.register
"""Make a function an estimator: `@register("mine", scope="group")`. `Estimator` says what may be promised."""


def check_choice(keyword: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a hyper-parameter that is not among the allowed words."""
    if value not in choices:
        raise ValueError(f"{keyword}={value!r} is not a choice.{suggestion(str(value), choices)}")
