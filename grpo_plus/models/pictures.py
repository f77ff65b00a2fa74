"""Images of padded rows, as a model's forward takes them: which row they belong to, and which rows have the same."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

PIXELS = "pixel_values"
NUM_IMAGES = "num_images"  # of each row: the count by which a trainer sorts the images
# Arguments of a forward that have an entry for each token: what kind of token it is.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
GRIDS = "image_grid_thw"  # (images, 3), from which some models compute the positions of tokens
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by bytes of an element


@dataclass(frozen=True)
class HostPictures:
    """What the host knows of the images of B rows.

    numbers: (B,) of each row, the number of the first row with the same images.
    types: for each argument that names the kinds of tokens, (B, L).
    grids: of each row, (images, 3). None where the model's images have no grid.
    """

    numbers: Tensor
    types: Mapping[str, Tensor]
    grids: Sequence[Tensor] | None

    def __getitem__(self, rows: slice | Tensor) -> "HostPictures":
        chosen = torch.arange(len(self.numbers))[rows].tolist()
        grids = None if self.grids is None else [self.grids[row] for row in chosen]
        return HostPictures(self.numbers[rows], {name: value[rows] for name, value in self.types.items()}, grids)


@dataclass(frozen=True)
class Pictures:
    """Images of B rows.

    images: for each argument of the model's forward, a tensor per row: its images, their patches or their tiles. Joined
        along the first dimension, the tensors of some rows are the argument for these rows. A row without images has
        tensors of length 0.
    types: for each argument that names the kinds of tokens, (B, L).
    counts: for each count that the trainer's forward takes beside the model's arguments, a number per row.
    known: what the host knows of the rows, where it was read before.
    """

    images: Mapping[str, Sequence[Tensor]]
    types: Mapping[str, Tensor]
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    known: HostPictures | None = None

    @classmethod
    def of(
        cls, fields: Mapping[str, Tensor | Sequence[Tensor]], counts: Mapping[str, Sequence[int]] | None = None
    ) -> Self:
        """Sort the arguments of a forward.

        Args:
            fields: each a list of one tensor per row, or a tensor with an entry per row.
            counts: as the attribute. A row of 0 images has none, whatever fills its place in a tensor.
        """
        images: dict[str, Sequence[Tensor]] = {
            name: value.split(1) if isinstance(value, Tensor) else value
            for name, value in fields.items()
            if name not in TOKEN_TYPES
        }
        if counts:
            images = {
                name: [own if number else own[:0] for own, number in zip(by_row, counts[NUM_IMAGES], strict=True)]
                for name, by_row in images.items()
            }
        return cls(
            images,
            {name: value for name, value in fields.items() if name in TOKEN_TYPES and isinstance(value, Tensor)},
            counts or {},
        )

    @classmethod
    def joined(cls, parts: Sequence["Pictures"]) -> "Pictures":
        """Rows of several parts, end to end. All parts have the same arguments."""
        return cls(
            {name: [tensor for part in parts for tensor in part.images[name]] for name in parts[0].images},
            {name: torch.cat([part.types[name] for part in parts]) for name in parts[0].types},
            {name: [count for part in parts for count in part.counts[name]] for name in parts[0].counts},
        )

    def take(self, rows: Iterable[int]) -> dict[str, Tensor]:
        """The forward's arguments for some rows, in this order. Without those that have nothing for these rows."""
        rows = list(rows)
        taken = {name: joined_entries([by_row[row] for row in rows]) for name, by_row in self.images.items()}
        return {name: tensor for name, tensor in taken.items() if len(tensor)}

    def arguments(self, rows: Sequence[int], index: Tensor) -> dict[str, Any]:
        """All that the trainer's forward of padded rows takes for some rows.

        Args:
            index: the rows, as a tensor on the device.
        """
        types = {name: value.index_select(0, index) for name, value in self.types.items()}
        counts = {name: [by_row[row] for row in rows] for name, by_row in self.counts.items()}
        return {**self.take(rows), **types, **counts}

    def has_images(self, rows: Iterable[int] | None = None) -> bool:
        """Whether one of the rows, or of all rows for None, has an image."""
        by_rows = list(self.images.values())
        return any(len(by_row[row]) for by_row in by_rows for row in (range(len(by_row)) if rows is None else rows))

    @cached_property
    def host(self) -> HostPictures:
        """What the host knows of the rows. Waits for the device where that was not read before."""
        if self.known is not None:
            return self.known
        grids, by_row = None, self.images.get(GRIDS)
        if by_row is not None:
            grids = torch.cat(list(by_row)).cpu().split([len(grid) for grid in by_row])
        types = {name: value.cpu() for name, value in self.types.items()}
        return HostPictures(torch.tensor(self.numbers()), types, grids)

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


def reads_images(model: PreTrainedModel) -> bool:
    """Whether a language model is only a part of the model."""
    return model.config.get_text_config(decoder=True) is not model.config


def image_token(config: Any) -> int | None:
    """The token that stands for an image, or for a part of an image. None where the config names no such token."""
    token: int | None = getattr(config, "image_token_id", None)
    return token


def joined_entries(parts: Sequence[Tensor]) -> Tensor:
    """Tensors end to end, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _checksum(tensor: Tensor) -> Tensor:
    """A number of the tensor's bits and of their places. Integers wrap around: the order of the sum changes nothing."""
    bits = tensor.contiguous().view(BITS[tensor.element_size()]).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return (bits * (places * 0x9E3779B1)).sum()


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a == b).all() for a, b in zip(one, other, strict=True)]).all()
