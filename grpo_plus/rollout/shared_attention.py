"""Attention of a decoding step that reads the keys of a prompt once for all completions of the prompt.

The rows of a prompt are one batch of queries on its keys. Scores on the prompt and on the row's own tokens are joined
before the softmax, so the softmax is the model's own, over the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_plus.rollout.live import Moves


@dataclass(frozen=True)
class Places:
    """Where the rows of the prompts stand in the batch, in order of prompts, and back.

    A prompt has as many slots as the prompt with the most rows has rows. A free slot repeats a row of its prompt.

    row_in_slot: (prompts, slots) index of a row.
    slot_of_row: (rows,) index in the flattened (prompts, slots).
    padding: (prompts, columns) to add to scores: 0, and -inf at padding. None where no prompt is padded.
    """

    row_in_slot: Tensor
    slot_of_row: Tensor
    padding: Tensor | None
    _of_heads: dict[int, "HeadPlaces"] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt_of_row: Sequence[int], padding: Tensor | None, device: torch.device) -> "Places":
        """Lay out rows of prompts 0, 1, ..., each of which has a row."""
        rows: list[list[int]] = [[] for _ in range(max(prompt_of_row) + 1)]
        for row, prompt in enumerate(prompt_of_row):
            rows[prompt].append(row)
        slots = max(map(len, rows))
        slot_of_row = torch.empty(len(prompt_of_row), dtype=torch.long)
        for prompt, members in enumerate(rows):
            slot_of_row[members] = prompt * slots + torch.arange(len(members))
        row_in_slot = torch.tensor([members + members[:1] * (slots - len(members)) for members in rows])
        return cls(row_in_slot.to(device, non_blocking=True), slot_of_row.to(device, non_blocking=True), padding)

    def of_heads(self, heads: int) -> "HeadPlaces":
        """The places for layers with a number of key heads, made once."""
        if heads not in self._of_heads:
            head, slots = torch.arange(heads, device=self.slot_of_row.device), self.row_in_slot.shape[1]
            to_slots = self.row_in_slot.unsqueeze(1) * heads + head.unsqueeze(1)  # (prompts, heads, slots)
            prompt, slot = (place.unsqueeze(1) for place in (self.slot_of_row // slots, self.slot_of_row % slots))
            to_rows = (prompt * heads + head) * slots + slot  # (rows, heads)
            padding = None if self.padding is None else self.padding.repeat_interleave(heads, 0).unsqueeze(1)
            self._of_heads[heads] = HeadPlaces(slots, to_slots.flatten(), to_rows.flatten(), padding)
        return self._of_heads[heads]


@dataclass(frozen=True)
class HeadPlaces:
    """Places of every row and key head.

    slots: of a prompt.
    to_slots: (prompts * heads * slots,) index in the flattened (rows, heads).
    to_rows: (rows * heads,) index in the flattened (prompts, heads, slots).
    padding: (prompts * heads, 1, columns), or None.
    """

    slots: int
    to_slots: Tensor
    to_rows: Tensor
    padding: Tensor | None


@dataclass(frozen=True)
class PromptStates:
    """Keys and values of the prompts in a layer.

    keys, values: (prompts, heads, n, D): the last n columns of the prompts, which end at the same column.
    window: number of tokens that a token sees, itself among them. None for all tokens.
    """

    keys: Tensor
    values: Tensor
    window: int | None

    def seen(self, own: int) -> int:
        """Number of columns that a row sees whose own tokens are `own`."""
        columns = self.keys.shape[2]
        return columns if self.window is None else max(0, min(columns, self.window - own))

    def keep(self, moves: Moves) -> "PromptStates":
        """Move the last prompts to the places that became free, in place."""
        for states in (self.keys, self.values):
            states[moves.target] = states[moves.source]
        return PromptStates(self.keys[: moves.count], self.values[: moves.count], self.window)


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: PromptStates,
    places: Places,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one token per row to the row's prompt and to the row's own tokens.

    Args:
        query: (B, heads, 1, D).
        key, value: (B, heads of keys, n, D) of the row's own tokens, the query's among them.
        sinks: (heads,) scores whose value is 0.

    Returns:
        (B, 1, heads, D), as transformers' attention functions do.
    """
    rows, heads, own, _ = key.shape
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q = query.reshape(rows * heads, -1, query.shape[-1])  # the query heads of a key head are together
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    scores = [_scores(q, keys, scale, softcap)]
    at = places.of_heads(heads)
    columns = prompts.seen(own)
    if columns:
        padding = None if at.padding is None else at.padding[..., -columns:]
        on_prompt = _scores(_grouped(q, at), prompts.keys[:, :, -columns:].flatten(0, 1), scale, softcap, padding)
        scores.insert(0, _ungrouped(on_prompt, q.shape[1], at))
    if sinks is not None:
        scores.append(sinks.to(q.dtype).view(1, heads, -1, 1).expand(rows, -1, -1, -1).flatten(0, 1))
    joined = torch.cat(scores, -1)
    # A softmax adds up in float32 whatever it is given. With its dtype said, autocast does not make the result wider.
    weights = joined.softmax(-1, dtype=joined.dtype).to(values.dtype)
    on_own = weights[..., columns : columns + own]
    if not columns:
        return torch.bmm(on_own, values).view(rows, 1, -1, values.shape[-1])
    of_prompt = torch.bmm(_grouped(weights[..., :columns], at), prompts.values[:, :, -columns:].flatten(0, 1))
    return torch.baddbmm(_ungrouped(of_prompt, q.shape[1], at), on_own, values).view(rows, 1, -1, values.shape[-1])


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None, padding: Tensor | None = None) -> Tensor:
    """Scale and cap the products of queries and keys, and hide padding. One operator where there is no cap."""
    if softcap is not None:
        capped = torch.bmm(q, k.mT).mul_(scale / softcap).tanh_().mul_(softcap)
        return capped if padding is None else capped + padding
    return torch.baddbmm(
        q.new_empty(()) if padding is None else padding, q, k.mT, beta=padding is not None, alpha=scale
    )


def _grouped(of_rows: Tensor, at: HeadPlaces) -> Tensor:
    """(rows * heads, queries, n) -> (prompts * heads, slots * queries, n)."""
    return of_rows.index_select(0, at.to_slots).view(-1, at.slots * of_rows.shape[1], of_rows.shape[-1])


def _ungrouped(grouped: Tensor, queries: int, at: HeadPlaces) -> Tensor:
    """(prompts * heads, slots * queries, n) -> (rows * heads, queries, n)."""
    return grouped.view(-1, queries, grouped.shape[-1]).index_select(0, at.to_rows)
