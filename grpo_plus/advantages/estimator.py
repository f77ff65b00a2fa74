"""What an advantage estimator is, and the registry of all of them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from grpo_plus.advantages.rewards import Rewards
from grpo_plus.registry import Described, Registry, suggestion

Scope = Literal["group", "batch"]
State = dict[str, Any]
Domain = Literal["real", "unit", "binary"]
Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Estimator(Described):
    """An advantage estimator and what it promises; the property tests hold it to these promises.

    Attributes:
        name: as written in `advantage_estimator`.
        function: (Rewards, *, hyper-parameters) -> (P, G) advantages, or (P, G, T) for one per token.
        scope: "group" if a prompt's advantages depend on its own completions alone, "batch" if on the whole batch.
        shift_invariant: adding a constant to every reward changes nothing.
        scale_invariant: multiplying every reward by a positive constant changes nothing (up to eps).
        sums_to_zero: the advantages of a group sum to zero.
        multi_reward: the reward functions' columns matter one by one, not only their weighted sum.
        normalizes_each: every reward function is divided by its own spread before the sum, so its unit does not matter.
        domain: the weighted sums it takes: "real" for any, "unit" for 0 to 1, "binary" for 0 and 1 only.
        needs_lengths: it needs the completions' lengths.
        trains_without_spread: a group of equal rewards may get advantages other than 0.
        stateful: the function takes, after the rewards, a dictionary that it reads and updates: JSON with strings as
            keys.
        needs_prompts: it tells prompts apart across batches.
        needs_steps: it needs the rewards of the completions' steps, and returns advantages per token.
    """

    name: str
    function: Callable[..., Tensor]
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

    def __call__(self, rewards: Rewards, keywords: Mapping[str, Any], state: State) -> Tensor:
        """The function's advantages; `state` is updated where it is stateful."""
        data = (rewards, state) if self.stateful else (rewards,)
        return self.function(*data, **keywords)

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The function's parameters after the rewards and the state."""
        return super().parameters[1:] if self.stateful else super().parameters


ESTIMATORS: Registry[Estimator] = Registry("advantage estimator", Estimator)


def register(
    name: str,
    *,
    scope: Scope = "batch",
    shift_invariant: bool = False,
    scale_invariant: bool = False,
    sums_to_zero: bool = False,
    multi_reward: bool = False,
    normalizes_each: bool = False,
    domain: Domain = "real",
    needs_lengths: bool = False,
    trains_without_spread: bool = False,
    stateful: bool = False,
    needs_prompts: bool = False,
    needs_steps: bool = False,
) -> Callable[[Function], Function]:
    """Make a function available as `advantage_estimator=name`.

    The function takes a `Rewards`, then keyword-only hyper-parameters, and returns (P, G) or (P, G, T) advantages. For
    what the keywords promise see `Estimator`.

    Raises:
        ValueError: the name is taken or is not an identifier.
    """

    def add(function: Function) -> Function:
        entry = Estimator(
            name,
            function,
            scope=scope,
            shift_invariant=shift_invariant,
            scale_invariant=scale_invariant,
            sums_to_zero=sums_to_zero,
            multi_reward=multi_reward,
            normalizes_each=normalizes_each,
            domain=domain,
            needs_lengths=needs_lengths,
            trains_without_spread=trains_without_spread,
            stateful=stateful,
            needs_prompts=needs_prompts,
            needs_steps=needs_steps,
        )
        ESTIMATORS.add(name, entry)
        return function

    return add


def check_choice(keyword: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a hyper-parameter that is not one of the words it may be."""
    if value not in choices:
        raise ValueError(f"{keyword}={value!r} is not a choice.{suggestion(str(value), choices)}")
