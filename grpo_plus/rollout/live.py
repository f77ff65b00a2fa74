"""The live rows of a batch: those that the model still computes, and their places in its cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moves:
    """How the places of a cache change when rows leave it. The last rows take the places that become free.

    Attributes:
        places: the former place of the row at each place that remains.
        order: (live,) the same on the device.
        source: former places of the rows that move, at the end.
        target: the places that they take.
    """

    places: tuple[int, ...]
    order: Tensor
    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, stays: Sequence[bool], device: torch.device) -> "Moves":
        """The moves that leave the places in `stays` alone, in one copy to the device."""
        count = sum(stays)
        target = [place for place in range(count) if not stays[place]]
        source = [place for place in range(count, len(stays)) if stays[place]]
        order = list(range(count))
        for free, taken in zip(target, source, strict=True):
            order[free] = taken
        sizes = [count, len(source), len(target)]
        copied = torch.tensor(order + source + target, dtype=torch.long).to(device, non_blocking=True)
        return cls(tuple(order), *copied.split(sizes))

    @property
    def count(self) -> int:
        """Places that remain."""
        return len(self.places)


class Live:
    """The rows of a batch of B that the model still computes.

    Attributes:
        rows: the row of the batch at each place of the cache.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.rows = list(range(batch))
        self._batch = batch
        self._device = device
        self._index: Tensor | None = None  # `rows` on the device; None while every row is live

    def leave(self, unfinished: Sequence[bool]) -> Moves | None:
        """Let finished rows leave.

        Args:
            unfinished: of all rows of the batch.

        Returns:
            None where every live row stays.
        """
        stays = [unfinished[row] for row in self.rows]
        if all(stays):
            return None
        moves = Moves.of(stays, self._device)
        index = torch.arange(self._batch, device=self._device) if self._index is None else self._index
        self._index = index.index_select(0, moves.order)
        self.rows = [self.rows[place] for place in moves.places]
        return moves

    def of(self, values: Tensor) -> Tensor:
        """The live rows of (B, ...), in the order of the cache."""
        return values if self._index is None else values.index_select(0, self._index)

    def whole(self, logits: Tensor) -> Tensor:
        """(B, V) out of (live, V). A finished row is 0 everywhere."""
        if self._index is None:
            return logits
        return logits.new_zeros(self._batch, logits.shape[-1]).index_copy_(0, self._index, logits)
