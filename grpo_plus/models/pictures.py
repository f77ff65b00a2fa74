"""Images of padded rows, as a model's forward takes them: which row they belong to, and which rows have the same."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Arguments of a forward that have an entry for each token: what kind of token it is.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by bytes of an element


@dataclass(frozen=True)
class Pictures:
    """Images of B rows.

    images: for each argument of the model's forward, a tensor per row: its images, their patches or their tiles. Joined
        along the first dimension, the tensors of some rows are the argument for these rows. A row without images has
        tensors of length 0.
    types: for each argument that names the kinds of tokens, (B, L).
    """

    images: Mapping[str, Sequence[Tensor]]
    types: Mapping[str, Tensor]

    @classmethod
    def of(cls, fields: Mapping[str, Tensor | Sequence[Tensor]]) -> Self:
        """Sort the arguments of a forward.

        Args:
            fields: each a list of one tensor per row, or a tensor with an entry per row.
        """
        images = {name: value for name, value in fields.items() if name not in TOKEN_TYPES}
        return cls(
            {name: value.split(1) if isinstance(value, Tensor) else value for name, value in images.items()},
            {name: value for name, value in fields.items() if name in TOKEN_TYPES and isinstance(value, Tensor)},
        )

    def take(self, rows: Iterable[int]) -> dict[str, Tensor]:
        """The forward's arguments for some rows, in this order. Without those that have nothing for these rows."""
        rows = list(rows)
        taken = {name: torch.cat([by_row[row] for row in rows]) for name, by_row in self.images.items()}
        return {name: tensor for name, tensor in taken.items() if len(tensor)}

    def numbers(self) -> list[int]:
        """For each row, the number of the first row with the same images. Waits twice for the device."""
        rows = list(zip(*self.images.values(), strict=True))
        sums = torch.stack([torch.stack([_checksum(tensor) for tensor in row]) for row in rows]).tolist()
        shapes = [tuple(tensor.shape for tensor in row) for row in rows]
        first: dict[object, int] = {}
        keys = [(shape, *own) for shape, own in zip(shapes, sums, strict=True)]
        numbers = [first.setdefault(key, at) for at, key in enumerate(keys)]
        # Equal sums are a guess. What they put together is compared, and a row that differs stands alone.
        same = torch.stack([_equal(row, rows[number]) for row, number in zip(rows, numbers, strict=True)]).tolist()
        return [number if equal else at for at, (number, equal) in enumerate(zip(numbers, same, strict=True))]


def _checksum(tensor: Tensor) -> Tensor:
    """A number of the tensor's bits and of their places. Integers wrap around: the order of the sum changes nothing."""
    bits = tensor.contiguous().view(BITS[tensor.element_size()]).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return (bits * (places * 0x9E3779B1)).sum()


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a == b).all() for a, b in zip(one, other, strict=True)]).all()
