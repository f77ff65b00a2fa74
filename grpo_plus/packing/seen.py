"""What prompts take beside their tokens: images, the kinds of their tokens, and the positions that follow from both."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from grpo_plus.models.pictures import GRIDS, NUM_IMAGES, HostPictures, Pictures, image_token, joined_entries

if TYPE_CHECKING:
    from grpo_plus.packing.layout import Group

TYPES_OF_GRIDS = "mm_token_type_ids"  # what a model that has positions by grids asks for beside the grids


@dataclass(frozen=True)
class Seen:
    """What one prompt of n tokens takes beside the tokens.

    images: the prompt's images by argument of the model's forward, on the model's device. Empty for a prompt of text.
    types: for each argument that names kinds of tokens, (n,) on the CPU.
    counts: what a trainer's forward of padded rows is told of the images.
    grid: (images, 3) on the CPU. None where the model's images have no grid.
    positions: (3, n) on the CPU. None where positions count tokens.
    """

    images: Mapping[str, Tensor]
    types: Mapping[str, Tensor]
    counts: Mapping[str, int]
    grid: Tensor | None
    positions: Tensor | None = None

    @classmethod
    def of(cls, pictures: Pictures, row: int, prompt: Tensor) -> "Seen":
        """What the prompt of a row takes.

        Args:
            prompt: (L,) booleans on the CPU, where the row has its prompt.
        """
        known = pictures.host
        return cls(
            pictures.take([row]),
            {name: value[row][prompt] for name, value in known.types.items()},
            {name: by_row[row] for name, by_row in pictures.counts.items()},
            None if known.grids is None else known.grids[row],
        )

    def without_first(self) -> "Seen":
        """What the prompt without its first token takes, which is one of text."""
        types = {name: value[1:] for name, value in self.types.items()}
        return replace(self, types=types, positions=None if self.positions is None else self.positions[:, 1:])

    def arguments(self, length: int, device: torch.device) -> dict[str, Any]:
        """What a trainer's forward takes for one row: the prompt, then text up to `length` tokens."""
        types = {name: pad(value, (0, length - len(value)))[None].to(device) for name, value in self.types.items()}
        return {**self.images, **types, **{name: [count] for name, count in self.counts.items()}}


def joined_images(prompts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Images of several prompts, in order."""
    names = {name: None for images in prompts for name in images}
    return {name: joined_entries([images[name] for images in prompts if name in images]) for name in names}


def why_not_seen(
    model: PreTrainedModel, groups: Sequence["Group"], known: HostPictures, completion_length: int
) -> str | None:
    """Reason why completions of prompts with images cannot go on from a cache. None where they may."""
    image = image_token(model.config)
    typed = any(types[:, -completion_length:].any() for types in known.types.values())
    if typed or any(group.seen and _go_on_in_completions(group, group.seen, image) for group in groups):
        return "a completion has images, such as a tool's"
    if any(group.seen and group.seen.images and int(group.prompt[-1]) == image for group in groups):
        return "a prompt ends within an image"
    find = getattr(model.base_model, "get_rope_index", None)
    if find is None:
        return None
    if TYPES_OF_GRIDS not in inspect.signature(find).parameters:
        return f"{type(model.base_model).__name__} finds the positions of an image's tokens in a way of its own"
    if any(group.seen and (group.seen.grid is None or TYPES_OF_GRIDS not in group.seen.types) for group in groups):
        return f"the batch lacks {GRIDS} or {TYPES_OF_GRIDS}, from which the model finds the positions of tokens"
    return None


def _go_on_in_completions(group: "Group", seen: Seen, image: int | None) -> bool:
    """Whether some of the images are a completion's: trainers do not type the tokens of images for every model.

    A policy may write the token of an image, too. Then the prompt has a run of these tokens for each image.
    """
    if image is None or not any(completion.eq(image).any() for completion in group.completions):
        return False
    is_image = pad(group.prompt.eq(image), (1, 0))
    runs = int((is_image[1:] & ~is_image[:-1]).sum())
    return runs < seen.counts.get(NUM_IMAGES, 0)


def located(model: PreTrainedModel, groups: Sequence["Group"]) -> list["Group"]:
    """Groups with the positions that the model gives the tokens of their prompts."""
    if getattr(model.base_model, "get_rope_index", None) is None:
        return list(groups)
    return [replace(group, seen=_located(model, group.prompt, group.seen)) if group.seen else group for group in groups]


def _located(model: PreTrainedModel, prompt: Tensor, seen: Seen) -> Seen:
    # The model keeps nothing of this call, and no forward of ours lets the model look for positions itself. What it
    # remembers of a generation or of a forward of TRL's stays as it is.
    positions, _ = model.base_model.get_rope_index(
        prompt[None], **{TYPES_OF_GRIDS: seen.types[TYPES_OF_GRIDS][None], GRIDS: seen.grid}
    )
    return replace(seen, positions=positions[:, 0])


def seen_probes(model: PreTrainedModel, groups: Sequence["Group"]) -> tuple["Group", "Group"]:
    """Two groups for a self-check: one with an image, and one whose images have other sizes where there is one.

    Prompts stay whole, because an image cannot be cut. Images are copied, so that a gradient can be asked for at each.
    """
    first, *others = sorted(groups, key=lambda group: not _shapes(group))
    assert first.seen is not None
    other = next(
        (group for group in others if _shapes(group) not in ([], _shapes(first))), others[0] if others else first
    )
    if other is first and len(first.prompt) > 1 and int(first.prompt[0]) != image_token(model.config):
        other = replace(first, prompt=first.prompt[1:], seen=first.seen.without_first())
    return _with_copies(first), _with_copies(other)


def _shapes(group: "Group") -> list[object]:
    assert group.seen is not None
    return [(name, tensor.shape) for name, tensor in group.seen.images.items()]


def _with_copies(group: "Group") -> "Group":
    assert group.seen is not None
    return replace(group, seen=replace(group.seen, images={name: t.clone() for name, t in group.seen.images.items()}))
