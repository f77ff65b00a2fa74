"""The rows that TRL generates for, with their images, which TRL does not lay out by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_plus.models.pictures import NUM_IMAGES, PIXELS, TOKEN_TYPES, Pictures
from grpo_plus.trainer.names import NUM_TILES
from grpo_plus.trainer.update.pictures import knows_rows, pictures_of

PATCHES = "spatial_shapes"  # (tiles, 2), patches of each tile


@dataclass(frozen=True)
class Shown:
    """Rows of one call of TRL's generation.

    Attributes:
        prompt_ids: of each row.
        images: of each row, a list or None. None where no row has an image.
        fields: what the processor made of the images, and what kind each token is.
        image_token: id of the token that stands for a piece of an image. None where the model names none.
    """

    prompt_ids: list[list[int]]
    images: list | None
    fields: dict[str, Any]
    image_token: int | None

    @cached_property
    def pictures(self) -> Pictures | str | None:
        """The images by row, or the reason why they cannot be sorted. None without images."""
        made = {name: _tensor(value) for name, value in self.fields.items() if name not in TOKEN_TYPES}
        return self.by_row(made) if PIXELS in made else None

    @property
    def why_whole(self) -> str | None:
        """Reason why the rows cannot be cut into parts. None where they can."""
        return self.pictures if isinstance(self.pictures, str) else None

    def __getitem__(self, rows: slice) -> "Shown":
        if isinstance(self.pictures, str):
            raise ValueError(self.pictures)
        fields: dict[str, Any] = {name: self.fields[name][rows] for name in TOKEN_TYPES if name in self.fields}
        if self.pictures is not None:
            fields |= self.pictures.take(range(len(self.prompt_ids))[rows])
        images = None if self.images is None else self.images[rows]
        return Shown(self.prompt_ids[rows], images, fields, self.image_token)

    def by_row(self, tensors: Mapping[str, Tensor]) -> Pictures | str:
        """Tensors that are made of the images, by row; or the reason why they cannot be sorted."""
        counts = [len(own or ()) for own in self.images or [None] * len(self.prompt_ids)]
        arguments: dict[str, Any] = {**tensors, NUM_IMAGES: counts}
        if (sizes := _sizes_of_tiles(tensors, sum(counts))) is not None:
            tiles = tiles_by_row(sizes, [sum(token == self.image_token for token in ids) for ids in self.prompt_ids])
            if tiles is None:
                return "nothing tells which tiles an image was cut into"
            arguments[NUM_TILES] = tiles
        pictures = pictures_of(arguments) if knows_rows(arguments) else None
        return pictures or "nothing tells which row an image belongs to"


def _tensor(value: Any) -> Tensor:
    """As TRL makes a tensor of what a processor gives."""
    return value if isinstance(value, Tensor) else torch.tensor(np.array(value))


def _sizes_of_tiles(tensors: Mapping[str, Tensor], images: int) -> list[int] | None:
    """The size of each tile, in any unit. None where an image is not cut into tiles, or its tiles are one entry."""
    if PATCHES in tensors:
        return tensors[PATCHES].prod(-1).tolist()
    pixels = tensors[PIXELS]
    return [1] * len(pixels) if pixels.dim() == 4 and len(pixels) != images else None


def tiles_by_row(sizes: Sequence[int], tokens: Sequence[int]) -> list[int] | None:
    """How many tiles each row has, since a tile takes as many tokens as it is large. None where that does not come out.

    Args:
        sizes: of all tiles, in the order of the rows.
        tokens: that stand for images, of each row.
    """
    ends = {0: 0} | {size * sum(tokens): number for number, size in enumerate(accumulate(sizes), 1)}
    found = [ends.get(end * sum(sizes)) for end in accumulate(tokens, initial=0)]
    numbers = [number for number in found if number is not None]
    comes_out = len(numbers) == len(found) and numbers[0] == 0
    return [end - start for start, end in pairwise(numbers)] if comes_out else None
