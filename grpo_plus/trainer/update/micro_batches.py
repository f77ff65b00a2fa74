"""What the host knows of the micro-batches that it trains on, read in one copy for a whole generation batch.

Which rows live and how they are laid out is decided on the host. Reading that from the device, micro-batch by
micro-batch, would make the host wait until the device has finished the micro-batch before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grpo_plus.models.pictures import PIXELS, HostPictures, Pictures
from grpo_plus.packing import Layout, group_rows
from grpo_plus.trainer.names import trained_tokens
from grpo_plus.trainer.update.pictures import pictures_of, with_images

Inputs = dict[str, Any]
Alive = Callable[[Inputs], Tensor | None]  # (B,) booleans: rows that can have a gradient; None: all rows

COLUMNS = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")
READ = (*COLUMNS, "tool_mask", "advantages", PIXELS)


@dataclass(frozen=True)
class HostRows:
    """Rows of one or several micro-batches, on the host.

    input_ids, attention_mask: (B, L).
    completion_length: T.
    trained: (B,) number of trained tokens.
    alive: (B,) 1 for a row that can have a gradient.
    pictures: what the host knows of the rows' images. None where no row has an image.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_length: int
    trained: Tensor
    alive: Tensor
    pictures: HostPictures | None = None

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """A key for each row's prompt: token ids, 0 at padding, after a number for its images."""
        end = self.input_ids.shape[1] - self.completion_length
        tokens = (self.input_ids * self.attention_mask)[:, :end].tolist()
        numbers = [0] * len(tokens) if self.pictures is None else self.pictures.numbers.tolist()
        return [(number, *ids) for number, ids in zip(numbers, tokens, strict=True)]

    @property
    def tokens(self) -> list[int]:
        """Trained tokens of each row that goes through the model; the others weigh nothing."""
        return (self.trained * self.alive).tolist()

    @property
    def live(self) -> tuple[int, ...] | None:
        """The rows to forward. None: all."""
        if bool(self.alive.all()):
            return None
        if not bool(self.alive.any()):
            # Every process needs a backward: the shortest row gives gradients of 0, not None.
            lengths = self.attention_mask[:, -self.completion_length :].sum(1)
            return (int(torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()),)
        return tuple(self.alive.nonzero().squeeze(1).tolist())

    def __getitem__(self, rows: Any) -> "HostRows":
        return HostRows(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.completion_length,
            self.trained[rows],
            self.alive[rows],
            None if self.pictures is None else self.pictures[rows],
        )


class Known:
    """What the host knows of a micro-batch, as long as the micro-batch holds the tensors that were read."""

    def __init__(self, inputs: Inputs, rows: HostRows) -> None:
        tensors: dict[str, Tensor] = {name: inputs[name] for name in READ if name in inputs}
        self.made_of = {name: (tensor, tensor._version) for name, tensor in tensors.items()}
        self.live = rows.live
        pictures = with_images(pictures_of(inputs), rows.live)
        self.pictures = pictures and replace(pictures, known=rows.pictures)
        self._rows = rows

    @cached_property
    def layout(self) -> Layout:
        """Groups of the live rows."""
        own = self._rows
        made_of = own.input_ids, own.attention_mask, own.completion_length
        return Layout(group_rows(*made_of, rows=self.live, pictures=self.pictures))

    def fits(self, inputs: Inputs) -> bool:
        """Whether the micro-batch holds what was read: the same tensors, in which nobody has written since."""
        return all(inputs.get(name) is made[0] and made[0]._version == made[1] for name, made in self.made_of.items())


class MicroBatches:
    """Micro-batches of the last generation batch that the host knows.

    They are beside TRL's dictionaries and not in them, so that whoever saves or changes a dictionary meets TRL's
    tensors alone.
    """

    def __init__(self) -> None:
        self._known: list[Known] = []

    def keep(self, batches: Sequence[Inputs], rows: HostRows) -> None:
        """Remember the micro-batches of a generation batch, in order, in the place of earlier ones."""
        size = len(batches[0]["prompt_ids"])
        self._known = [Known(batch, rows[at * size : (at + 1) * size]) for at, batch in enumerate(batches)]

    def of(self, inputs: Inputs, alive: Alive) -> Known:
        """What is known of a micro-batch, read anew where it has changed, or came from a checkpoint."""
        known = (known for known in self._known if known.fits(inputs))
        return next(known, None) or Known(inputs, read([inputs], alive))


def read(batches: Sequence[Inputs], alive: Alive) -> HostRows:
    """Copy what the host must know to the host, in one piece."""
    tables = []
    for batch in batches:
        live = alive(batch)
        trained = trained_tokens(batch).sum(1, keepdim=True)
        columns = [batch[name] for name in COLUMNS]
        lives = torch.ones_like(trained) if live is None else live.unsqueeze(1)
        tables.append(torch.cat([column.long() for column in (*columns, trained, lives)], dim=1))
    table = torch.cat(tables).cpu()
    width, length = columns[0].shape[1] + columns[1].shape[1], columns[1].shape[1]
    pictures = _host_pictures(batches)
    return HostRows(table[:, :width], table[:, width : 2 * width], length, table[:, -2], table[:, -1], pictures)


def _host_pictures(batches: Sequence[Inputs]) -> HostPictures | None:
    """What the host must know of all images, compared once with each other."""
    parts = [pictures for batch in batches if (pictures := pictures_of(batch)) is not None]
    return Pictures.joined(parts).host if parts else None
