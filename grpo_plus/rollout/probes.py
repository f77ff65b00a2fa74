"""Rows of a batch's own prompts, on which a keeper is tried before it is used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from grpo_plus.models.pictures import TOKEN_TYPES, Pictures, image_token, reads_images
from grpo_plus.rollout.given import Given

LENGTH = 96  # tokens of a probe's prompt, at most. A prompt with images stays whole.


@dataclass(frozen=True)
class Probe:
    """A row without padding.

    Attributes:
        row: of the batch, whose images belong to the probe.
        ids: (L,)
        types: for each argument that names the kinds of tokens, (L,).
    """

    row: int
    ids: Tensor
    types: dict[str, Tensor]

    def cut(self, part: slice) -> "Probe":
        """A part of the tokens."""
        return replace(self, ids=self.ids[part], types={name: kinds[part] for name, kinds in self.types.items()})

    def followed_by(self, tokens: Tensor) -> "Probe":
        """The row with tokens of text at its end."""
        types = {name: pad(kinds, (0, len(tokens))) for name, kinds in self.types.items()}
        return replace(self, ids=torch.cat([self.ids, tokens]), types=types)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the left.

    Attributes:
        ids: (rows, L).
        arguments: mask, kinds of tokens and positions, as transformers gives them to the model.
        images: as the model's forward takes them. Empty for rows of text.
    """

    ids: Tensor
    arguments: dict[str, Tensor | None]
    images: dict[str, Tensor]


@dataclass(frozen=True)
class Probes:
    """Two rows of one prompt and a row of a shorter prompt, each with the tokens of its steps.

    Attributes:
        longer, shorter: the prompts.
        tokens: of each row. The first row takes one step, the others two.
        pictures: of the batch that the prompts are from. None for rows of text.
        positions: whether transformers gives the model positions.
    """

    longer: Probe
    shorter: Probe
    tokens: tuple[Tensor, Tensor, Tensor]
    pictures: Pictures | None
    positions: bool

    @classmethod
    def of(cls, given: Given) -> "Probes":
        """Take the longest and the shortest prompt. No two rows go on alike if there are enough tokens of text."""
        lengths, pictures = [len(tokens) for tokens in given.prompts.tokens], given.pictures
        ends = lengths.index(max(lengths)), lengths.index(min(lengths))
        longer, shorter = (_without_padding(given, int(given.prompts.first[prompt])) for prompt in ends)
        if pictures is None:
            longer, shorter = longer.cut(slice(-LENGTH, None)), shorter.cut(slice(-LENGTH, None))
        most = max(1, len(longer.ids) - 1)
        # A prompt ends with text, and may begin with an image.
        shorter = shorter.cut(slice(-most, None) if pictures is None else slice(most))
        known = torch.cat([longer.ids, shorter.ids]).unique()
        if (image := image_token(given.model.config)) is not None:
            known = known[known != image]
        low, middle, high = known[:1], known[len(known) // 2][None], known[-1:]
        tokens = low, torch.cat([middle, high]), torch.cat([high, low])
        return cls(longer, shorter, tokens, pictures, given.arguments.get("position_ids") is not None)

    @property
    def prompts(self) -> list[Probe]:
        """The prompts of the three rows."""
        return [self.longer, self.longer, self.shorter]

    def rows(self) -> list[Probe]:
        """The three rows, with their tokens."""
        return [prompt.followed_by(tokens) for prompt, tokens in zip(self.prompts, self.tokens, strict=True)]

    def batch(self, model: PreTrainedModel, rows: Sequence[Probe], padding: int = 0) -> Batch:
        """Put rows into one batch, with more padding if wanted."""
        length = max(len(row.ids) for row in rows) + padding
        ids = _left_padded([row.ids for row in rows], length)
        tokens = torch.tensor([len(row.ids) for row in rows], device=ids.device)
        mask = (torch.arange(length, device=ids.device) >= length - tokens[:, None]).long()
        types = {name: _left_padded([row.types[name] for row in rows], length) for name in rows[0].types}
        images = {} if self.pictures is None else self.pictures.take(row.row for row in rows)
        arguments: dict[str, Tensor | None] = {"attention_mask": None if bool(mask.all()) else mask, **types}
        if self.positions:
            arguments["position_ids"] = _positions(model, ids, {"attention_mask": mask} | types | images)
        return Batch(ids, arguments, images)


def _without_padding(given: Given, row: int) -> Probe:
    """A row of the batch."""
    arguments, mask = given.arguments, given.arguments.get("attention_mask")
    real = slice(None) if mask is None else mask[row].bool()
    types = {name: arguments[name][row][real] for name in TOKEN_TYPES if arguments.get(name) is not None}
    return Probe(row, given.input_ids[row][real], types)


def _left_padded(rows: list[Tensor], length: int) -> Tensor:
    padded = pad_sequence([row.flip(0) for row in rows], batch_first=True)
    return pad(padded, (0, length - padded.shape[1])).flip(1)


def _positions(model: PreTrainedModel, ids: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    """Positions as transformers gives them to this model."""
    if not reads_images(model):
        return (arguments["attention_mask"].cumsum(1) - 1).clamp(min=0)
    positions: Tensor = model._prepare_position_ids_for_generation(ids, arguments)
    return positions
