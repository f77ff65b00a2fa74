"""Estimators that ask for the same update: their advantages over a log are equal up to one positive factor."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from grpo_plus.report.svg import LONGEST_NAME

# Relative RMS differences. Rounding alone stays below the first; below the second no figure of a report differs.
EQUAL, NEARLY = 1e-5, 1e-3


@dataclass(frozen=True)
class Twin:
    """An estimator that another one equals, up to a factor.

    Attributes:
        factor: by which this one's advantages are multiplied to get the other's.
        difference: what the factor leaves, as a relative RMS difference.
    """

    name: str
    factor: float
    difference: float

    def __str__(self) -> str:
        """The twin as part of an equation: "= rloo x 1.14"."""
        sign = "=" if self.difference <= EQUAL else "≈"
        factor = "" if abs(self.factor - 1) < NEARLY else f" x {self.factor:.3g}"
        return f"{sign} {self.name}{factor}"


@dataclass(frozen=True)
class Family:
    """Estimators with one direction of the update.

    Attributes:
        name: the first one, which stands for all.
        index: its place among the names.
        twins: the others.
    """

    name: str
    index: int
    twins: tuple[Twin, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.name, *(twin.name for twin in self.twins))

    @property
    def label(self) -> str:
        """The family in one line: "dr_grpo = rloo x 0.875"."""
        return " ".join((self.name, *map(str, self.twins)))

    @property
    def short(self) -> str:
        """The family beside a figure: its label where that is short, else the first name and a count."""
        return (
            self.label
            if len(self.label) <= LONGEST_NAME
            else self.name + (f" and {len(self.twins)} alike" if self.twins else "")
        )


def families(names: Sequence[str], products: Tensor, lead: str) -> list[Family]:
    """Names whose advantages are multiples of each other, together: the family of `lead` first, then by their first.

    One is a multiple of the other up to the relative difference √(1 − cos²). An estimator without any advantage is
    alone.

    Args:
        products: (E, E) sums of products of advantages over the log.
    """
    found: dict[int, list[Twin]] = {}
    for e in sorted(range(len(names)), key=lambda e: names[e] != lead):
        for first, twins in found.items():
            if (twin := _twin(names[e], products, first, e)) is not None:
                twins.append(twin)
                break
        else:
            found[e] = []
    return [Family(names[first], first, tuple(twins)) for first, twins in found.items()]


def _twin(name: str, products: Tensor, first: int, e: int) -> Twin | None:
    """`name`, number e, as a twin of the estimator `first`; None where it is none."""
    both, squares, squares_of_first = products[first, e], products[e, e], products[first, first]
    if both <= 0:
        return None
    difference = (1 - both * both / squares / squares_of_first).clamp(min=0).sqrt().item()
    return Twin(name, (both / squares).item(), difference) if difference <= NEARLY else None
