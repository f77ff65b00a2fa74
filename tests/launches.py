"""Counts the operators that would launch a kernel on a GPU: what the host has to do for one call of a model."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operators that make a view, or memory that nobody has filled: no kernel runs.
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "detach", "detach_", "set_", "lift_fresh"),
    *("expand", "transpose", "t", "permute", "squeeze", "unsqueeze", "select", "slice", "narrow", "diagonal", "unfold"),
    *("split", "split_with_sizes", "unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Launches(TorchDispatchMode):
    """Counts, while it is entered, the operators that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name.split("::")[1]
        if name not in VIEWS:
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


def launches_per_layer(count: Callable[[int], int], layers: tuple[int, int] = (2, 4)) -> float:
    """Launches of one decoder layer: of a model with more layers minus those of one with fewer, per layer.

    Args:
        count: number of decoder layers -> launches of one call of such a model.
    """
    fewer, more = layers
    return (count(more) - count(fewer)) / (more - fewer)
