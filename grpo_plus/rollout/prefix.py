"""The cache with shared prompts: a prompt's keys and values are kept once, and read once per step for all its rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo_plus.models.layers import why_not_packed_row
from grpo_plus.rollout.cache import GrowingLayer, GrowingWindowLayer
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.prompts import Prompts
from grpo_plus.rollout.shared_attention import Places, PromptStates, shared_attention

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)
NAME = "grpo_plus_shared_prompts"
# Bytes of keys and values that a layer need not read again at every step, for nine more operators to pay. On a CPU both
# ways took the same time at 3.5 and 5 MiB, and at 10 MiB a rollout took 0.8 times as long. A GPU reads 64 MiB at
# 1 TB/s while its host launches nine kernels (arithmetic, not measured).
LEAST_SAVED = {"cpu": 4 * 2**20}
LEAST_SAVED_ELSEWHERE = 64 * 2**20


def why_not_own_layers(model: PreTrainedModel, cache: DynamicCache) -> str | None:
    """Reason why the layers of a cache cannot be replaced by others that hold keys and values."""
    others = {type(layer).__name__ for layer in cache.layers if type(layer) not in KEYS_AND_VALUES}
    if others:
        return f"a cache with {', '.join(sorted(others))} does not hold keys and values alone"
    if len(cache.layers) != model.config.get_text_config().num_hidden_layers:
        return "layers read the keys of other layers"
    return why_not_packed_row(model)


class SharedPrompts(Keeper):
    """The prompts' keys and values once, and for each row those of its own tokens.

    Attributes:
        layers: keys and values of the prompts that still have a row, by the number of the layer.
        places: the rows of each of these prompts.
    """

    words = "one cache of each prompt"

    def __init__(self, model: PreTrainedModel, cache: DynamicCache) -> None:
        super().__init__(model, cache)
        self.layers: dict[int, PromptStates] = {}
        self._prompt_of_row: list[int] = []
        self.places: Places
        self._padding: Tensor | None = None

    @classmethod
    def why_not(cls, model: PreTrainedModel, cache: DynamicCache) -> str | None:
        """Reason why the model's attention cannot be replaced for a step. With None it may; the self-check decides."""
        return why_not_own_layers(model, cache)

    @classmethod
    def pays(cls, model: PreTrainedModel, prompts: Prompts, length: int) -> bool:
        """Whether a step saves enough reading of keys and values."""
        saved = (len(prompts.index) - len(prompts.first)) * length * _bytes_of_token(model)
        return saved >= LEAST_SAVED.get(model.device.type, LEAST_SAVED_ELSEWHERE)

    def expand(self, index: Tensor, mask: Tensor | None) -> None:
        """Keep the prompts, and begin with no token for every row."""
        self._prompt_of_row = index.tolist()
        for number, layer in enumerate(self.cache.layers):
            window = layer.sliding_window if layer.is_sliding else None
            self.layers[number] = PromptStates(layer.keys.contiguous(), layer.values.contiguous(), window)
            self.cache.layers[number] = _own_tokens(layer, len(index))
        if mask is not None and not bool(mask.all()):
            like = self.layers[0].keys
            self._padding = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
            self._padding.masked_fill_(mask == 0, -torch.inf)
        self._place()

    def keep(self, moves: Moves) -> None:
        """Move rows, and forget the prompts that have no row left."""
        for layer in self.cache.layers:
            layer.keep(moves)
        self._prompt_of_row = [self._prompt_of_row[place] for place in moves.places]
        self._forget_prompts()
        self._place()

    def inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Give the attention layers this object, and no mask."""
        return arguments | {"attention_mask": None, "shared_prompts": self}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the model's attention. Inside, a call of the model that is no step of this rollout is an error."""
        AttentionInterface.register(NAME, _attention)
        configs = {id(config): config for config in (self.model.config, self.model.config.get_text_config())}.values()
        names = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, name in zip(configs, names, strict=True):
                config._attn_implementation = name

    def _forget_prompts(self) -> None:
        left, count = set(self._prompt_of_row), len(self.places.row_in_slot)
        moves = Moves.of([prompt in left for prompt in range(count)], self.places.slot_of_row.device)
        if moves.count == count:
            return
        self.layers = {number: prompts.keep(moves) for number, prompts in self.layers.items()}
        new = {prompt: place for place, prompt in enumerate(moves.places)}
        self._prompt_of_row = [new[prompt] for prompt in self._prompt_of_row]
        if self._padding is not None:
            self._padding = self._padding.index_select(0, moves.order)

    def _place(self) -> None:
        self.places = Places.of(self._prompt_of_row, self._padding, self.layers[0].keys.device)


class _OwnTokens(GrowingLayer):
    """The tokens of the rows after their prompts."""

    def __init__(self, keys: Tensor, values: Tensor, prompt: int) -> None:
        super().__init__(keys, values)
        self._prompt = prompt

    def get_seq_length(self) -> int:
        """Tokens of the prompt and of the rows, from which models count positions where nobody gives any."""
        return self._prompt + self._end - self._start


def _own_tokens(layer: DynamicLayer, rows: int) -> GrowingLayer:
    """A layer that has seen the prompt, and holds no token."""
    prompt = layer.get_seq_length()
    keys, values = (states[:1, :, :0].expand(rows, -1, -1, -1) for states in (layer.keys, layer.values))
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.keys, layer.values = keys, values
        return GrowingWindowLayer(layer)
    return _OwnTokens(keys, values, prompt)


def _bytes_of_token(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in a layer."""
    config: Any = model.config.get_text_config()
    own = vars(config)  # which a config also has where its layers differ, and reading an attribute is an error
    heads = own.get("num_key_value_heads") or config.num_attention_heads
    size = own.get("head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * heads * size * model.dtype.itemsize


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompts: SharedPrompts | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of a step."""
    if shared_prompts is None or query.shape[2] != 1:
        raise RuntimeError("the model was called in the middle of a rollout, while its attention reads shared prompts")
    if dropout or position_bias is not None:
        raise RuntimeError(f"attention to shared prompts knows no dropout and no bias, as {type(module).__name__} has")
    prompts = shared_prompts.layers[module.layer_idx]
    if sliding_window not in (None, prompts.window):
        raise RuntimeError(f"{type(module).__name__} has a window of {sliding_window}, its cache of {prompts.window}")
    places = shared_prompts.places
    return shared_attention(query, key, value, prompts, places, scaling=scaling, softcap=softcap, sinks=s_aux), None
