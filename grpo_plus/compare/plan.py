"""What a comparison trains: variants, which differ in estimator, loss or other fields, each on every seed: the arms."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_plus.advantages import ESTIMATORS
from grpo_plus.losses import LOSSES
from grpo_plus.report.secrets import masked

ESTIMATOR, LOSS, SEED = "advantage_estimator", "loss_type", "seed"
OWN_FIELDS = (ESTIMATOR, LOSS, SEED, "output_dir")  # fields of GRPOPlusConfig that a comparison sets itself


@dataclass(frozen=True)
class Variant:
    """An estimator, with a loss and further fields, that is compared with others.

    Attributes:
        estimator: a name that `grpo-plus ls advantages` prints, a dotted path, or a function.
        loss: a name that `grpo-plus ls losses` prints, a dotted path, or a function; None: the task's own.
        fields: further fields of GRPOPlusConfig by name, such as {"advantage_kwargs": {"k": 4}}.
        label: what the report calls it; made of the first three where empty.
        setting: fields that a sweep has set. They count as the fields do, but the label does not name them.
    """

    estimator: str
    loss: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    label: str = ""
    setting: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, registry in (("estimator", ESTIMATORS), ("loss", LOSSES)):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, registry[given].name)
        for name in OWN_FIELDS:
            if name in self.fields:
                raise ValueError(f"fields={dict(self.fields)} sets {name}, which the comparison sets itself. Drop it.")
        if not self.label:
            object.__setattr__(self, "label", self._described(self.fields))

    def _described(self, fields: Mapping[str, Any]) -> str:
        loss = f" + {self.loss}" if self.loss is not None else ""
        return f"{self.estimator}{loss}{_in_brackets(fields)}"

    @property
    def title(self) -> str:
        """The label with the setting: the same as the label of a variant that sets all of it by `fields`."""
        if self.label == self._described(self.fields):
            return self._described({**self.fields, **self.setting})
        return self.label + _in_brackets(self.setting)

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields of GRPOPlusConfig in which this variant differs from the task's own."""
        loss = {} if self.loss is None else {LOSS: self.loss}
        return {ESTIMATOR: self.estimator, **loss, **self.fields, **self.setting}


def _in_brackets(fields: Mapping[str, Any]) -> str:
    given = ", ".join(f"{name}={value}" for name, value in masked(fields).items())
    return f" ({given})" if given else ""


@dataclass(frozen=True)
class Arm:
    """A variant trained on a seed, which decides the order of the prompts and every random draw."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant.title}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """For the file system; the same for the same arm in every run."""
        words = re.sub(r"[^\w.=-]+", "-", self.variant.title).strip("-.")
        return f"{words}-seed{self.seed}"

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields of GRPOPlusConfig in which this arm differs from the task's own."""
        return {**self.variant.overrides, SEED: self.seed}


def as_variants(given: Sequence[Variant | str]) -> list[Variant]:
    """Variants; a plain name or a function is an estimator."""
    return [variant if isinstance(variant, Variant) else Variant(variant) for variant in given]


def planned_arms(variants: Sequence[Variant | str], seeds: Sequence[int]) -> list[Arm]:
    """Every variant on every seed, seed by seed, so that a comparison that is cut short has whole pairs.

    Args:
        variants: a plain name or a function is an estimator.

    Raises:
        ValueError: an unknown name, two variants or seeds that are the same, no variant or seed, or a seed out of
            range.
    """
    chosen = as_variants(variants)
    if not chosen:
        raise ValueError("There is nothing to compare. Name at least one estimator.")
    if not seeds:
        raise ValueError("A comparison needs at least 1 seed, and 3 or more for intervals over runs.")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed!r} cannot seed every generator. Choose whole numbers from 0 to 2**32 - 1.")
    arms = [Arm(variant, seed) for seed in seeds for variant in chosen]
    folders = [arm.folder.casefold() for arm in arms]
    for arm, folder in zip(arms, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(
                f"{arm.name!r} is there twice, or two labels differ in signs only. Give every variant a label of its "
                "own, and every seed once."
            )
    return arms
