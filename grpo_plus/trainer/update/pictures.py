"""TRL's images, which lie end to end for all rows of a batch, by row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_plus.models.pictures import GRIDS, NUM_IMAGES, PIXELS, TOKEN_TYPES, Pictures
from grpo_plus.trainer.names import MULTIMODAL, NUM_TILES, PIXEL_MASK, multimodal

Inputs = dict[str, Any]
COUNTS = (NUM_IMAGES, NUM_TILES)


def pictures_of(inputs: Inputs) -> Pictures | None:
    """The images of a micro-batch by row. None for a batch of text.

    Args:
        inputs: TRL's dictionary, or the arguments of TRL's forward.
    """
    fields = multimodal(inputs)
    if PIXELS not in fields:
        return None
    counts = {name: fields[name] for name in COUNTS if name in fields}
    return Pictures.of(_by_row(fields) | {name: fields[name] for name in TOKEN_TYPES if name in fields}, counts)


def knows_rows(inputs: Inputs) -> bool:
    """Whether the images tell which rows they belong to. True for a batch of text."""
    fields = multimodal(inputs)
    if PIXELS not in fields:
        return True
    images = fields.get(NUM_IMAGES, ())
    entries = {len(images), sum(images), sum(fields.get(NUM_TILES, images))}
    return all(len(fields[name]) in entries or (name == PIXELS and GRIDS in fields) for name in _tensors(fields))


def with_images(pictures: Pictures | None, live: Sequence[int] | None = None) -> Pictures | None:
    """The same. None where no row that goes through the model has an image."""
    return pictures if pictures is not None and pictures.has_images(live) else None


def split_by_row(inputs: Inputs) -> Inputs:
    """TRL's dictionary with an entry per row in every list and tensor."""
    fields = multimodal(inputs)
    return inputs | _by_row(fields) if PIXELS in fields else inputs


def joined_by_row(inputs: Inputs) -> Inputs:
    """Undo `split_by_row`."""
    lists = [name for name in MULTIMODAL if isinstance(inputs.get(name), list) and name not in COUNTS]
    return inputs | {name: torch.cat(inputs[name]) for name in lists}


def _by_row(fields: Inputs) -> dict[str, list[Tensor]]:
    """Cut all tensors of images into one part per row."""
    return {name: list(fields[name].split(_sizes(name, fields))) for name in _tensors(fields)}


def _tensors(fields: Inputs) -> list[str]:
    return [name for name in fields if name not in (*COUNTS, *TOKEN_TYPES)]


def _sizes(name: str, fields: Inputs) -> list[int]:
    """Entries that each row has in an argument: of its patches, its tiles, its images, or one for the row itself."""
    images, tiles, entries = fields[NUM_IMAGES], fields.get(NUM_TILES), len(fields[name])
    if name == PIXELS and GRIDS in fields:
        patches = iter(fields[GRIDS].prod(-1).tolist())
        return [sum(next(patches) for _ in range(count)) for count in images]
    if tiles is not None and entries == sum(tiles):
        return list(tiles)
    # Where images have a mask and no tiles, the processor has given each row a tensor, filled up with empty images.
    is_filled_up = PIXEL_MASK in fields and tiles is None
    return list(images) if entries == sum(images) and not is_filled_up else [1] * len(images)
