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
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

Key = tuple[str, int, int]  # what is recorded, layer, which of the layer's states


class PromptRecord(DynamicCache):
    """Cache that keeps what the layers write while a prompt goes through.

    A checkpointed layer writes again in the backward. The second writing is not kept, because its graph would live as
    long as the record.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.states: dict[Key, tuple[Tensor, ...]] = {}
        _records.add(self)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep keys and values, (1, heads, n, D)."""
        self.states.setdefault(("attention", layer_idx, 0), (key_states, value_states))
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
        self.states.setdefault(("conv", layer_idx, state_idx), (full[..., -size:],))
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the state after the prompt."""
        self.states.setdefault(("recurrent", layer_idx, state_idx), (recurrent_states,))
        return recurrent_states


_records: WeakSet[PromptRecord] = WeakSet()


def forget_prompts() -> None:
    """Empty every record, after a graph that no backward walks to its end.

    Such a graph would never be freed. A waiting checkpoint holds its layer and the record, and the record holds the
    graph with the checkpoint. This circle runs through C++, which Python's collector does not see.
    """
    for record in list(_records):
        record.states.clear()


class PromptReader(DynamicCache):
    """Cache that serves prompts' records to `rows` completions and takes nothing in.

    Args:
        prompt_length: tokens of the recorded prompts, padding included.
        prompts: (rows,) index of each completion's prompt. None where the record has one prompt.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        record: PromptRecord,
        rows: int,
        prompt_length: int,
        prompts: Tensor | None = None,
    ) -> None:
        super().__init__(config=config)
        self.rows, self.prompts = rows, prompts
        self.states: dict[Key, tuple[Tensor, ...]] = {}
        for key, states in record.states.items():
            kind, layer_idx, state_idx = key
            layer = self.layers[layer_idx]
            if kind == "attention":
                states = self._fill_attention(layer, states, prompt_length)
            else:
                layer.has_previous_state[state_idx] = True  # models ask for this before they choose masks
            self.states[key] = states

    def _fill_attention(self, layer: Any, states: tuple[Tensor, ...], prompt_length: int) -> tuple[Tensor, ...]:
        """Put the states where the layer's own `get_seq_length` and `get_mask_sizes` look for their shapes."""
        if layer.is_sliding:
            layer.cumulative_length = prompt_length
            states = tuple(state[:, :, -(layer.sliding_window - 1) :] for state in states)
        shown = [state[:1].expand(self.rows, *state.shape[1:]) for state in states]
        layer.lazy_initialization(*shown)
        layer.keys, layer.values = shown
        return states

    def _of_rows(self, state: Tensor) -> Tensor:
        """State of each completion's prompt. Made in the layer that needs it, so that no two layers keep copies."""
        if self.prompts is None:
            return state.expand(self.rows, *state.shape[1:])
        return state.index_select(0, self.prompts)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keys and values of the prompt, then of the completions."""
        keys, values = map(self._of_rows, self.states["attention", layer_idx, 0])
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Columns of the prompt that the convolution sees."""
        return self._of_rows(self.states["conv", layer_idx, state_idx][0])

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """State after the prompt."""
        return self._of_rows(self.states["recurrent", layer_idx, state_idx][0])

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Columns of the prompt, then of the completions."""
        return torch.cat([self.get_conv_state(layer_idx, state_idx), conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep nothing, because nothing follows a completion."""
        return recurrent_states


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
