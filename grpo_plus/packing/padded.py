"""Padded rows as TRL has them, what is known of them on the host, and values for their tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.models.pictures import Pictures
from grpo_plus.packing.forward import Form, Logps, Ready, install_packed_forward
from grpo_plus.packing.layout import Group, group_rows, runs
from grpo_plus.packing.recomputed import one_by_one
from grpo_plus.packing.seen import located
from grpo_plus.packing.transfer import on_device

if TYPE_CHECKING:
    from grpo_plus.packing.kept import Truncated


class Layout:
    """Groups of padded rows, read once, and laid out once for each form and device.

    groups: None where a row with something to score has an empty prompt.
    """

    def __init__(self, groups: list[Group] | None) -> None:
        self.groups = groups
        self._is_located = False
        self._ready: dict[tuple[Form, torch.device, int | None, int | None], list[Ready]] = {}

    @classmethod
    def of(cls, rows: "PaddedRows") -> "Layout":
        """Read rows of which the host knows nothing."""
        return cls.read(rows.input_ids, rows.attention_mask, rows.completion_length, rows.live, rows.pictures)

    @classmethod
    def read(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        live: Sequence[int] | None,
        pictures: Pictures | None = None,
    ) -> "Layout":
        """Group rows by their prompts, after one copy to the host, and few more for images."""
        ids, mask = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu()
        return cls(group_rows(ids, mask, completion_length, rows=live, pictures=pictures))

    def locate(self, base: PreTrainedModel) -> None:
        """Give the tokens of prompts with images the positions that the model gives them, once."""
        if self.groups and not self._is_located:
            self.groups, self._is_located = located(base, self.groups), True

    def ready(self, form: Form, device: torch.device, max_tokens: int | None, bound: int | None = None) -> list[Ready]:
        """Groups as the form forwards them.

        Args:
            max_tokens: most tokens of several groups that go together. None puts all groups together.
            bound: most tokens of one pass, which cuts longer groups. None leaves groups whole.
        """
        key = form, device, max_tokens, bound
        if key not in self._ready:
            self._ready[key] = list(self._parts(form, device, max_tokens, bound))
        return self._ready[key]

    def _parts(self, form: Form, device: torch.device, max_tokens: int | None, bound: int | None) -> Iterator[Ready]:
        most = min((limit for limit in (max_tokens, bound) if limit is not None), default=None)
        groups = form.arrange(self.groups or ())
        for some in runs(groups, lambda some: most is None or form.tokens(some, device) <= most):
            if bound is not None and len(some) == 1 and form.tokens(some, device) > bound:
                yield from form.ready_in_parts(some[0], device, bound)
            else:
                yield form.ready(some, device)


@dataclass(frozen=True)
class PaddedRows:
    """Padded rows as TRL has them.

    input_ids, attention_mask: (B, L), prompts padded on the left, completions on the right.
    completion_length: T; the last T columns are completions.
    live: the rows to forward. None forwards all rows that have a token to score.
    fill: (B, T) log-probabilities of rows that are not forwarded. None fills in zeros.
    layout: what the live rows hold, where the host knows already. None reads the rows, and waits for the device.
    truncated: what the sampler could draw. None normalizes over the whole vocabulary.
    pictures: the images of all rows. None where no live row has an image.
    are_unsorted: whether there are images of which nothing tells the rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_length: int
    live: tuple[int, ...] | None = None
    fill: Tensor | None = None
    layout: "Layout | None" = None
    truncated: "Truncated | None" = None
    pictures: Pictures | None = None
    are_unsorted: bool = False

    @property
    def completion_mask(self) -> Tensor:
        """1 where there is a completion token, (B, T)."""
        return self.attention_mask[:, -self.completion_length :]

    def forwarded(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """The rows to forward, padded: their places, ids and mask, and what else a trainer's forward takes for them."""
        device = self.input_ids.device
        live = range(len(self.input_ids)) if self.live is None else self.live
        index = on_device(torch.tensor(live), device)
        more = {} if self.pictures is None else self.pictures.arguments(live, index)
        return index, self.input_ids.index_select(0, index), self.attention_mask.index_select(0, index), more


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


def forward_live(rows: PaddedRows, forward: Callable[..., Logps]) -> Packed:
    """Run the live rows through a forward of padded rows.

    Args:
        forward: (input_ids, attention_mask, what else the rows have by name) -> log-probs and entropies.
    """
    index, ids, mask, more = rows.forwarded()
    logps, entropies = forward(ids, mask, **more)
    scored = mask[:, -rows.completion_length :].bool()
    mean = torch.where(scored, entropies.detach(), 0.0).sum() / scored.sum().clamp(min=1)
    return Packed(
        filled(rows, logps).index_copy(0, index, logps),
        imputed(rows, mean).index_copy(0, index, entropies),
        ids.numel(),
    )


def forward_padded(
    model: nn.Module,
    base: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    forward: Callable[[Any, Tensor, Tensor], Logps],
    max_tokens: int | None,
) -> Logps:
    """Run padded rows through a forward, (model, input_ids, attention_mask) -> log-probs and entropies.

    Args:
        model: `base`, or the wrapper to call.
        max_tokens: most tokens of one pass, of which a backward holds one at a time. None runs all rows at once.
    """
    rows, length = input_ids.shape
    at_once = rows if max_tokens is None else max(1, max_tokens // length)
    if at_once >= rows or not torch.is_grad_enabled():
        return forward(model, input_ids, attention_mask)
    install_packed_forward(base)
    parts = list(zip(input_ids.split(at_once), attention_mask.split(at_once), strict=True))

    def call(base: PreTrainedModel, _: Callable[..., Any]) -> Logps:
        return one_by_one((partial(forward, base, *part) for part in parts), len(parts), input_ids.device)

    logps, entropies = model(packed=call)
    return logps, entropies


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
