"""Padded rows as TRL has them, what is known of them on the host, and values for their tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_plus.packing.forward import Form, Ready
from grpo_plus.packing.layout import Group, group_rows
from grpo_plus.packing.transfer import on_device

if TYPE_CHECKING:
    from grpo_plus.packing.kept import Truncated


class Layout:
    """Groups of padded rows, read once, and laid out once for each form and device.

    groups: None where a row with something to score has an empty prompt.
    """

    def __init__(self, groups: list[Group] | None) -> None:
        self.groups = groups
        self._ready: dict[tuple[Form, torch.device, int | None], list[Ready]] = {}

    @classmethod
    def read(
        cls, input_ids: Tensor, attention_mask: Tensor, completion_length: int, live: Sequence[int] | None
    ) -> "Layout":
        """Group rows by their prompts, after one copy to the host."""
        ids, mask = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu()
        return cls(group_rows(ids, mask, completion_length, rows=live))

    def ready(self, form: Form, device: torch.device, max_tokens: int | None) -> list[Ready]:
        """Groups as the form forwards them, at most `max_tokens` at a time. None puts them all together."""
        key = form, device, max_tokens
        if key not in self._ready:
            groups = form.arrange(self.groups or ())
            self._ready[key] = [form.ready(chunk, device) for chunk in _chunks(groups, form, device, max_tokens)]
        return self._ready[key]


def _chunks(groups: Sequence[Group], form: Form, device: torch.device, max_tokens: int | None) -> Iterator[list[Group]]:
    chunk: list[Group] = []
    for group in groups:
        if chunk and max_tokens is not None and form.tokens([*chunk, group], device) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(group)
    yield chunk


@dataclass(frozen=True)
class PaddedRows:
    """Padded rows as TRL has them.

    input_ids, attention_mask: (B, L), prompts padded on the left, completions on the right.
    completion_length: T; the last T columns are completions.
    live: the rows to forward. None forwards all rows that have a token to score.
    fill: (B, T) log-probabilities of rows that are not forwarded. None fills in zeros.
    layout: what the live rows hold, where the host knows already. None reads the rows, and waits for the device.
    truncated: what the sampler could draw. None normalizes over the whole vocabulary.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_length: int
    live: tuple[int, ...] | None = None
    fill: Tensor | None = None
    layout: "Layout | None" = None
    truncated: "Truncated | None" = None

    @property
    def completion_mask(self) -> Tensor:
        """1 where there is a completion token, (B, T)."""
        return self.attention_mask[:, -self.completion_length :]

    def forwarded(self) -> tuple[Tensor, Tensor]:
        """Ids and mask of the rows to forward, padded."""
        if self.live is None:
            return self.input_ids, self.attention_mask
        index = torch.tensor(self.live, device=self.input_ids.device)
        return self.input_ids[index], self.attention_mask[index]


@dataclass(frozen=True)
class Packed:
    """Log-probabilities and entropies of padded rows.

    logps: (B, T).
    entropies: (B, T). A row that was not forwarded has the mean entropy of the forwarded tokens.
    tokens: number of tokens that went through the model.
    """

    logps: Tensor
    entropies: Tensor
    tokens: int


def forward_live(rows: PaddedRows, forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Packed:
    """Run the live rows through a forward of padded rows, (input_ids, attention_mask) -> log-probs and entropies."""
    index = on_device(torch.tensor(rows.live), rows.input_ids.device)
    ids, mask = rows.input_ids.index_select(0, index), rows.attention_mask.index_select(0, index)
    logps, entropies = forward(ids, mask)
    scored = mask[:, -rows.completion_length :].bool()
    mean = torch.where(scored, entropies.detach(), 0.0).sum() / scored.sum().clamp(min=1)
    return Packed(
        filled(rows, logps).index_copy(0, index, logps),
        imputed(rows, mean).index_copy(0, index, entropies),
        ids.numel(),
    )


def filled(rows: PaddedRows, logps: Tensor) -> Tensor:
    """Log-probabilities (B, T) of rows that are not forwarded, in the dtype of `logps`."""
    # A skipped row keeps its old log-probs: its ratio is 1, so every loss is 0 there. Zeros could overflow to inf * 0.
    if rows.fill is None:
        return torch.zeros_like(rows.completion_mask, dtype=logps.dtype)
    return rows.fill.to(logps.dtype)


def imputed(rows: PaddedRows, mean: Tensor) -> Tensor:
    """Entropies (B, T) of rows that are not forwarded: the mean entropy of the forwarded tokens."""
    # 0 would read as a collapse in the log.
    return mean * rows.completion_mask.to(mean.dtype)
