"""Caches for a shared prompt on any model: two passes through the model's own cache, with gradients.

First the prompt goes through the model, into a cache that keeps what each layer writes. Then the completions go
through, on a cache that serves these records to every completion and takes nothing in. Both passes are part of one
graph, so the backward reaches the prompt through the records. Masks and attention stay the model's. Whatever
transformers can cache works, including sliding windows, attention sinks, recurrent and convolution layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

Key = tuple[str, int, int]  # what is recorded, layer, which of the layer's states or, of attention, which part
States = dict[Key, tuple[Tensor, ...]]


class PromptRecord(DynamicCache):
    """Cache that keeps what the layers write while a prompt goes through, until `take`.

    A checkpointed layer writes again in the backward, and holds this cache until then. The second writing is not kept,
    and the first is kept by whoever has taken it. A graph that hung on its own checkpoint would never be freed where no
    backward walks it to its end: the circle runs through C++, which Python's collector does not see.

    Args:
        part: number of the part, of a prompt that goes through in parts.
    """

    def __init__(self, config: PretrainedConfig, *, part: int = 0) -> None:
        super().__init__(config=config)
        self.part = part
        self.states: States = {}
        self._is_taken = False

    def take(self) -> States:
        """Hand over what is recorded."""
        states, self.states, self._is_taken = self.states, {}, True
        return states

    def _keep(self, key: Key, *states: Tensor) -> None:
        if not self._is_taken:
            self.states[key] = states

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep keys and values, (1, heads, n, D)."""
        self._keep(("attention", layer_idx, self.part), key_states, value_states)
        return key_states, value_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None, because nothing precedes a prompt."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None, because nothing precedes a prompt."""

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Keep the prompt's last columns, which a convolution still sees. Zeros stand before a short prompt."""
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        full = nn.functional.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        self._keep(("conv", layer_idx, state_idx), full[..., -size:])
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the state after the prompt."""
        self._keep(("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states


class PromptReader(DynamicCache):
    """Cache that serves prompts' records to `rows` completions and takes nothing in.

    Args:
        recorded: by a `PromptRecord`.
        prompt_length: tokens of the recorded prompts, padding included.
        prompts: (rows,) index of each completion's prompt. None where the record has one prompt.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        recorded: States,
        rows: int,
        prompt_length: int,
        prompts: Tensor | None = None,
    ) -> None:
        super().__init__(config=config)
        self.rows, self.prompts = rows, prompts
        self.states: dict[Key, Tensor] = {}
        self.attention: dict[int, list[tuple[Tensor, ...]]] = {}  # by layer: keys and values of the prompt's parts
        for (kind, layer_idx, which), states in recorded.items():
            if kind == "attention":
                self.attention.setdefault(layer_idx, []).append(states)
            else:
                self.layers[layer_idx].has_previous_state[which] = True  # models ask for this, then choose masks
                self.states[kind, layer_idx, which] = states[0]
        for layer_idx, parts in self.attention.items():
            self._fill_attention(self.layers[layer_idx], parts, prompt_length)

    def _fill_attention(self, layer: Any, parts: list[tuple[Tensor, ...]], prompt_length: int) -> None:
        """Put shapes where the layer's own `get_seq_length` and `get_mask_sizes` look for them."""
        if layer.is_sliding:
            layer.cumulative_length = prompt_length
            parts[:] = _last(parts, layer.sliding_window - 1)
        length = sum(keys.shape[2] for keys, _ in parts)
        shown = [state[:1, :, :1].expand(self.rows, -1, length, -1) for state in parts[0]]
        layer.lazy_initialization(*shown)
        layer.keys, layer.values = shown

    def _of_rows(self, state: Tensor) -> Tensor:
        """State of each completion's prompt. Made in the layer that needs it, so that no two layers keep copies."""
        if self.prompts is None:
            return state.expand(self.rows, *state.shape[1:])
        return state.index_select(0, self.prompts)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keys and values of the prompt, then of the completions."""
        keys, values = (map(self._of_rows, parts) for parts in zip(*self.attention[layer_idx], strict=True))
        return torch.cat([*keys, key_states], dim=2), torch.cat([*values, value_states], dim=2)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Columns of the prompt that the convolution sees."""
        return self._of_rows(self.states["conv", layer_idx, state_idx])

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """State after the prompt."""
        return self._of_rows(self.states["recurrent", layer_idx, state_idx])

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Columns of the prompt, then of the completions."""
        return torch.cat([self.get_conv_state(layer_idx, state_idx), conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep nothing, because nothing follows a completion."""
        return recurrent_states


class PartReader(PromptReader):
    """Cache of a further part of a prompt: serves the parts before it, and records what the part adds.

    Args:
        before: what the parts before have recorded.
        length: tokens of these parts.
        part: record of this part.
    """

    def __init__(self, config: PretrainedConfig, before: States, length: int, part: PromptRecord) -> None:
        super().__init__(config, before, 1, length)
        self.part = part

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keys and values of the prompt so far. Those of the part are recorded."""
        self.part.update(key_states, value_states, layer_idx)
        return super().update(key_states, value_states, layer_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Columns of the part, after the columns before it that its convolution sees. The last ones are recorded."""
        seen = self.get_conv_state(layer_idx, state_idx).shape[-1]
        full = super().update_conv_state(conv_states, layer_idx, state_idx)
        self.part.update_conv_state(full, layer_idx, state_idx, conv_kernel_size=seen)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Record the state after the part."""
        return self.part.update_recurrent_state(recurrent_states, layer_idx, state_idx)


def _last(parts: list[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
    """The last `count` tokens of keys and values."""
    found: list[tuple[Tensor, ...]] = []
    for states in reversed(parts):
        found.insert(0, tuple(state[:, :, -count:] for state in states))
        count -= found[0][0].shape[2]
        if count <= 0:
            break
    return found


@contextmanager
def checkpoints_with_cache(model: nn.Module) -> Iterator[None]:
    """Let checkpointed layers keep the cache that they get, which transformers would take from them.

    Inside, the checkpoints are non-reentrant whatever the training asked for. A reentrant checkpoint has no graph from
    the states that it wrote into a cache.
    """
    flagged = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    flagged = flagged if model.training else []
    layers = [module for module in flagged if isinstance(module, GradientCheckpointingLayer)]
    replaced = [(layer, layer.__dict__.get("forward")) for layer in layers]
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func
        layer.forward = partial(checkpoint, partial(_plain, layer, layer.forward), use_reentrant=False)
    for module in flagged:  # a flagged model refuses a cache, too
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, forward in replaced:
            del layer.forward
            if forward is not None:  # a hook's, such as accelerate's for a model spread over devices
                layer.forward = forward
        for module in flagged:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _plain(layer: GradientCheckpointingLayer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the layer's forward without transformers' checkpoint, which is on again in the backward."""
    before = layer.gradient_checkpointing
    layer.gradient_checkpointing = False
    try:
        return forward(*args, **kwargs)
    finally:
        layer.gradient_checkpointing = before
