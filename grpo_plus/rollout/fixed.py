"""A decoding step on memory of fixed shapes: the same kernels on the same addresses, whatever rows and lengths are."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo_plus.models.caches import CACHE
from grpo_plus.rollout.live import Moves

COLUMNS = 256  # by which a cache grows
LEAST_STEPS = 16  # that a bucket has room for: to begin another takes as long as two or three steps


@dataclass(frozen=True)
class Bucket:
    """Shapes of a step.

    rows: a power of 2.
    columns: tokens that a row of the cache has room for.
    """

    rows: int
    columns: int

    @classmethod
    def of(cls, rows: int, tokens: int) -> "Bucket":
        """The smallest bucket for rows of some tokens, and `LEAST_STEPS` tokens more."""
        return cls(1 << (rows - 1).bit_length(), ceil((tokens + LEAST_STEPS) / COLUMNS) * COLUMNS)


class FixedLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, D), of which a step writes one column.

    Args:
        layer: of a cache whose rows have seen some tokens, `FixedLayer` or another.
        index: (R,) the rows to copy.
        column: (1,) where a step writes.

    Attributes:
        window: tokens that a token sees, itself among them. None for all tokens.
    """

    def __init__(self, layer: Any, index: Tensor, tokens: int, bucket: Bucket, column: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = (_copy(states, index, tokens, bucket) for states in (layer.keys, layer.values))
        self.window: int | None = layer.window if isinstance(layer, FixedLayer) else _window(layer)
        self._column = column

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a token, and return all columns."""
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values

    def keep(self, moves: Moves) -> None:
        """Move rows within the memory."""
        for states in (self.keys, self.values):
            states[moves.target] = states[moves.source]


class FixedStep:
    """A step of the model on fixed memory.

    Args:
        cache: whose layers become fixed.
        index: (R,) rows of the cache to go on with.
        shown: (rows of the cache, tokens or more) False at the padding of prompts.
        tokens: that the rows have seen.

    Attributes:
        shown: (rows, columns) False at the padding of prompts.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, index: Tensor, shown: Tensor, tokens: int) -> None:
        bucket, device = Bucket.of(len(index), tokens), shown.device
        self._model, self._cache = model, cache
        self._tokens = torch.zeros(bucket.rows, 1, dtype=torch.long, device=device)
        self._positions = self._tokens.clone()
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._columns = torch.arange(bucket.columns, device=device)
        self.shown = torch.ones(bucket.rows, bucket.columns, dtype=torch.bool, device=device)
        self.shown[: len(index), :tokens] = shown[:, :tokens].index_select(0, index)
        for number, layer in enumerate(cache.layers):  # one by one, so that the former layers' memory becomes free
            cache.layers[number] = FixedLayer(layer, index, tokens, bucket, self._column)

    def write(self, tokens: Tensor, positions: Tensor | None, column: int) -> None:
        """Put tokens (R, 1) into the first rows, at a column of the cache. Without positions they are the column."""
        self._column.fill_(column)
        self._tokens[: len(tokens)] = tokens
        self._positions[: len(tokens)] = self._column if positions is None else positions

    def run(self) -> Tensor:
        """Logits (rows, V) of the written tokens. Another call does the same again."""
        outputs = self._model(
            input_ids=self._tokens,
            position_ids=self._positions,
            attention_mask=self._masks(),
            **{CACHE: self._cache},
            use_cache=True,
            return_dict=True,
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def keep(self, moves: Moves) -> None:
        """Move rows within the memory."""
        self.shown[moves.target] = self.shown[moves.source]
        for layer in self._cache.layers:
            layer.keep(moves)

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """Masks in the form in which transformers' models take them ready made: one, or one for each type of layer."""
        written = self._columns <= self._column
        by_window = {
            window: self._mask(written if window is None else written & (self._columns > self._column - window))
            for window in {layer.window for layer in self._cache.layers}
        }
        windows = [layer.window for layer in self._cache.layers]
        kinds = getattr(self._model.config.get_text_config(), "layer_types", None)
        if not kinds:
            return by_window[windows[0]]
        return {kind: by_window[window] for kind, window in zip(kinds, windows, strict=True)}

    def _mask(self, seen: Tensor) -> Tensor:
        """(rows, 1, 1, columns) to add to scores, since eager attention takes no booleans."""
        hidden = ~(self.shown & seen)
        dtype = self._model.dtype
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


def _copy(states: Tensor, index: Tensor, tokens: int, bucket: Bucket) -> Tensor:
    """Rows in `index`, which end at `tokens` tokens. Zeros stand elsewhere, since no mask hides a NaN."""
    held = states[:, :, :tokens].index_select(0, index)
    copy = states.new_zeros(bucket.rows, states.shape[1], bucket.columns, states.shape[3])
    copy[: len(index), :, tokens - held.shape[2] : tokens] = held
    return copy


def _window(layer: Any) -> int | None:
    window: int | None = layer.sliding_window if layer.is_sliding else None
    return window
