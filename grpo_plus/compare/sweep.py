"""A sweep: every variant is trained at several settings, and judged at its own best.

    compare(task, ["grpo", "gdpo"], seeds=range(5), folder="comparison", sweep={"learning_rate": [1e-5, 3e-5, 1e-4]})

The best of several settings looks better than it is, because the choice also picks the lucky trainings and the items
that happened to suit (the winner's curse). Whoever judges on what chose, overrates. So the two share nothing:

- Settings are chosen by the mean score of trainings on seeds of their own, `Sweep.seeds`. The chosen settings are then
  trained on the seeds of the comparison.
- Settings are chosen on one half of the held-out items. The report judges on the other half.

With S settings, C choosing seeds and J judging seeds, a variant costs S * C + J trainings. Half of the items is the
price of the second rule: intervals grow where items are few. `benchmarks/sweep.py` simulates what happens without the
first rule: the means are too high if all seeds choose and judge, and the intervals are too narrow if each seed is
judged at the setting that the other seeds chose.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from grpo_plus.compare.plan import OWN_FIELDS, Variant
from grpo_plus.compare.task import Scores
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.registry import did_you_mean

FIRST_SWEEP_SEED = 1000  # far from the seeds that people count from 0
SWEEP_SEEDS = (FIRST_SWEEP_SEED, FIRST_SWEEP_SEED + 1)
ITEMS_SEED = 0  # decides which items are in which half

Setting = Mapping[str, float]


@dataclass(frozen=True)
class Sweep:
    """Values by field of GRPOPlusConfig, and the seeds on which a setting is chosen among all combinations.

    Raises:
        ValueError: a field that is unknown, not numeric, or the comparison's own; values that are no choice.
    """

    grid: Mapping[str, Sequence[float]]
    seeds: Sequence[int] = SWEEP_SEEDS

    def __post_init__(self) -> None:
        if not self.grid:
            raise ValueError("sweep={} names no field. Name one with its values: {'learning_rate': [1e-5, 3e-5]}.")
        if not self.seeds:
            raise ValueError("A sweep needs at least 1 seed to choose a setting by.")
        grid = {name: _checked_values(name, values) for name, values in self.grid.items()}
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "seeds", tuple(self.seeds))

    @property
    def settings(self) -> list[Setting]:
        """Every combination of the values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def check_seeds(self, judging: Sequence[int]) -> None:
        """Raise ValueError where a seed would choose and judge."""
        if shared := sorted({*self.seeds} & {*judging}):
            raise ValueError(
                f"Seed {shared[0]} would choose a setting and judge the same setting. Let sweep_seeds={self.seeds} "
                "name none of the other seeds."
            )


def _checked_values(name: str, given: Sequence[float]) -> tuple[float, ...]:
    kind = _kind_of(name)
    values = tuple(_number(name, value, kind) for value in given)
    if len(values) < 2:
        raise ValueError(f"A sweep over {name}={list(given)} leaves nothing to choose. Name two values or more.")
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"A sweep has {name}={value} twice. Name every value once.")
    return values


def _kind_of(name: str) -> type[int] | type[float]:
    """Whether the field of GRPOPlusConfig holds whole numbers or any."""
    if name in OWN_FIELDS:
        raise ValueError(f"A sweep over {name} is impossible: the comparison sets {name} itself.")
    hints = get_type_hints(GRPOPlusConfig)
    known = [field.name for field in fields(GRPOPlusConfig)]
    if name not in known:
        near = did_you_mean(name, known)
        raise ValueError(f"A sweep over {name!r} is impossible: GRPOPlusConfig has no such field.{near}")
    kinds = {*(get_args(hints[name]) or (hints[name],))}
    if not kinds & {int, float}:
        raise ValueError(f"A sweep over {name} is impossible: the field is not numeric. Compare variants instead.")
    return float if float in kinds else int


def _number(name: str, value: Any, kind: type[int] | type[float]) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (kind is int and value != int(value)):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"A sweep has {name}={value!r}, which is not {what}. Write {what} for every value.")
    return kind(value)


@dataclass(frozen=True)
class Candidate:
    """A variant at one setting.

    Attributes:
        label: the variant's, without the setting.
        variant: what is trained.
        setting: every swept field with its value.
    """

    label: str
    variant: Variant
    setting: Setting


def candidates(variants: Sequence[Variant], sweep: Sweep, config: Callable[[Variant], Any]) -> list[Candidate]:
    """Every variant at every setting.

    A setting that is the variant's own already is the plain variant, so that arms trained without a sweep are found.

    Args:
        config: the configuration of a variant without the sweep.

    Raises:
        ValueError: a variant sets a swept field itself.
    """
    found = []
    for variant in variants:
        for name in sweep.grid:
            if name in variant.fields:
                raise ValueError(
                    f"{variant.label!r} sets {name} itself, so a sweep cannot. Drop {name} from the variant's fields, "
                    "or from the sweep."
                )
        own = config(variant)
        for setting in sweep.settings:
            is_own = all(getattr(own, name) == value for name, value in setting.items())
            trained = variant if is_own else replace(variant, setting=setting)
            found.append(Candidate(variant.label, trained, setting))
    return found


@dataclass(frozen=True)
class Halves:
    """The numbers of the held-out items that choose, and of those that judge."""

    choosing: Sequence[int]
    judging: Sequence[int]


def halves(items: int) -> Halves:
    """Two halves of the items at random, the same in every run; an odd item judges."""
    # By digests: no version of a library decides which half an item is in.
    drawn = sorted(range(items), key=lambda item: hashlib.sha256(f"{ITEMS_SEED}:{item}".encode()).digest())
    return Halves(sorted(drawn[: items // 2]), sorted(drawn[items // 2 :]))


def check_items(scores: Scores) -> None:
    """Raise ValueError where no item of the first score would choose."""
    name, values = next(iter(scores.items()))
    if len(values) < 2:
        raise ValueError(
            f"A sweep chooses on one half of the held-out items and judges on the other, but {name!r} has "
            f"{len(values)} item. Hold out 2 or more, better hundreds."
        )


def choosing_half(scores: Scores) -> dict[str, list[float]]:
    """The scores of the items that choose, by name."""
    return {name: [values[item] for item in halves(len(values)).choosing] for name, values in scores.items()}


def judging_half(scores: Scores) -> dict[str, list[float]]:
    """The scores of the items that judge, by name."""
    return {name: [values[item] for item in halves(len(values)).judging] for name, values in scores.items()}


def shown(setting: Setting) -> str:
    """A setting as words."""
    return ", ".join(f"{name}={value}" for name, value in setting.items())
