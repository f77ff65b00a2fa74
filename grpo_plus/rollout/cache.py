"""The expanded cache: every row has a copy of its prompt's keys and values, and grows in place."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.prompts import Prompts

BLOCK = 64  # tokens of room at least, in each new buffer


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers with room at the end: a step writes one token, and copies nothing."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._start, self._end = 0, keys.shape[-2]  # of the tokens that the buffers hold
        self._buffers = [_longer(states, self._end + BLOCK) for states in (keys, values)]
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens' keys and values behind the others, and return all of them."""
        end = self._end + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            end = self._move_to_longer_buffers(key_states.shape[-2])
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., self._end : end, :] = states
        self._end = end
        self._show()
        return self.keys, self.values

    def keep(self, moves: Moves) -> None:
        """Move the last rows to the places that became free."""
        for buffer in self._buffers:
            held = buffer[..., self._start : self._end, :]
            held[moves.target] = held[moves.source]
        self._buffers = [buffer[: moves.count] for buffer in self._buffers]
        self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows at these places."""
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._show()

    def _move_to_longer_buffers(self, more: int) -> int:
        """Make room for `more` tokens. Returns where they will end."""
        length = self._end - self._start
        room = length + more + max(BLOCK, length // 8)
        del self.keys, self.values  # so that one old buffer at a time lives beside the new
        for number, buffer in enumerate(self._buffers):
            self._buffers[number] = _longer(buffer[..., self._start : self._end, :], room)
        self._start, self._end = 0, length
        return length + more

    def _show(self) -> None:
        self.keys, self.values = (buffer[..., self._start : self._end, :] for buffer in self._buffers)


class GrowingWindowLayer(GrowingLayer):
    """The tokens that a sliding window sees, in buffers that the window slides through."""

    is_sliding = True

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        self.sliding_window = layer.sliding_window
        self.cumulative_length = layer.cumulative_length
        super().__init__(layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens, and return them behind the tokens that the first of them sees."""
        self.cumulative_length += key_states.shape[-2]
        self._start = max(self._start, self._end - self.sliding_window + 1)
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens that have been seen, with those that the window has left behind."""
        return self.cumulative_length

    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes
    get_max_length = DynamicSlidingWindowLayer.get_max_length


class Expanded(Keeper):
    """A copy of the prompt for every row. Works with every layer that beam search can reorder."""

    words = "cache in place"

    @classmethod
    def why_not(cls, model: PreTrainedModel, cache: DynamicCache) -> str | None:
        """There is no reason."""
        return None

    @classmethod
    def pays(cls, model: PreTrainedModel, prompts: Prompts, length: int) -> bool:
        """Always."""
        return True

    def expand(self, index: Tensor, mask: Tensor | None) -> None:
        """Copy each prompt's entry for its rows, and let the layers of attention grow in place."""
        # One layer after the other, so that one layer at a time is held twice. Layers of linear attention have no
        # `batch_repeat_interleave`; every layer has a `reorder_cache`, which takes any index.
        for number, layer in enumerate(self.cache.layers):
            layer.reorder_cache(index)
            self.cache.layers[number] = _growing(layer)

    def keep(self, moves: Moves) -> None:
        """Move rows within the layers that grow in place, and copy the others."""
        for layer in self.cache.layers:
            if isinstance(layer, GrowingLayer):
                layer.keep(moves)
            else:
                layer.reorder_cache(moves.order)


def _growing(layer: Any) -> Any:
    """The layer with room for more tokens. Layers that hold something else than keys and values stay as they are."""
    if type(layer) is DynamicLayer and layer.is_initialized:
        return GrowingLayer(layer.keys, layer.values)
    if type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
        return GrowingWindowLayer(layer)
    return layer


def _longer(states: Tensor, tokens: int) -> Tensor:
    buffer = states.new_empty(*states.shape[:-2], tokens, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer
