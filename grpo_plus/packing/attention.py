"""Segment attention: what a token of a packed row may attend to, without an N x N mask.

A shared prompt attends causally to itself. A completion attends to its prompt, and causally to itself. Both are
ordinary calls of the model's own attention: one call for the prompt, one or several calls for its completions. Scaling,
grouped queries, soft-capping and attention sinks therefore stay the model's affair.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_plus.models.layers import why_not_packed_row, window_of
from grpo_plus.packing.cascade import Cascade, cascade_attention
from grpo_plus.packing.layout import Span

PREFIX = "grpo_plus_"
SUPPORTED = ("sdpa", "eager")

Attention = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class Segments:
    """What the attention layers know of a packed row.

    spans: places of the groups, with indices on the model's device.
    pairs_per_call: pairs of query and key that cost as much as one more call. A group's completions share one padded
        call where the padding is cheaper than a call for each completion.
    masks: masks that earlier layers needed. Later layers reuse them, since layers differ by the window at most.
    """

    spans: tuple[Span, ...]
    pairs_per_call: float
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def together(self, span: Span) -> bool:
        """Whether the completions of the group share a call."""
        return span.padding_pairs <= self.pairs_per_call * len(span.ends)

    def mask(self, length: int, past: int, window: int | None, like: Tensor) -> Tensor:
        """Get a `_causal_mask`, made once."""
        key = (length, past, window, like.dtype, like.device)
        if key not in self.masks:
            self.masks[key] = _causal_mask(length, past, window, like)
        return self.masks[key]


def why_not_segments(model: PreTrainedModel) -> str | None:
    """Reason why segments would be wrong on this model. With None they may be right; the self-check decides."""
    name = model.config.get_text_config()._attn_implementation.removeprefix(PREFIX)
    if name not in SUPPORTED:
        return f"attention {name!r} is not one of {', '.join(SUPPORTED)}"
    return why_not_packed_row(model)


def install_segments(model: PreTrainedModel) -> None:
    """Let the model's attention layers take `segments=...`, a `Segments` or a `Cascade`.

    Without segments the layers compute what they did before. The attention stays until `uninstall_segments`, because a
    checkpointed layer calls its attention again during the backward, long after the forward returned.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        name = config._attn_implementation
        if not name.startswith(PREFIX):
            _register(name)
            config._attn_implementation = PREFIX + name


def uninstall_segments(model: PreTrainedModel) -> None:
    """Give the model back the name of its attention. Graphs that still wait for a backward must be gone."""
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def _register(name: str) -> None:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        segments: Segments | Cascade | None = kwargs.pop("segments", None)
        if isinstance(segments, Cascade):
            return cascade_attention(module, query, key, value, segments, **kwargs), None
        attend = _attention_of(module, name)
        if segments is None:
            with nullcontext() if name in SUPPORTED else _own_name(module.config, name):
                return attend(module, query, key, value, attention_mask, **kwargs)
        return segment_attention(
            attend, module, query, key, value, segments, needs_mask=name == "eager", **kwargs
        ), None

    AttentionInterface.register(PREFIX + name, attention)
    if name in ALL_MASK_ATTENTION_FUNCTIONS:  # a model gives no mask to any other
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


@contextmanager
def _own_name(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Show the attention function the name it was registered under, by which flash attention finds its kernel."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention_of(module: nn.Module, name: str) -> Attention:
    if name == "eager":  # each model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def segment_attention(
    attend: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    needs_mask: bool,
    **kwargs: Any,
) -> Tensor:
    """Attention of a packed row.

    Args:
        attend: the model's attention function, with transformers' signature.
        query: (1, heads, N, D), D the width of a head.
        key, value: (1, heads of keys, N, D).
        needs_mask: whether `attend` sees all keys where it gets no mask. sdpa does not: it is told to be causal.

    Returns:
        (1, N, heads, D), as transformers' attention functions do.
    """
    window = window_of(module, kwargs)
    kwargs.pop("is_causal", None)

    def call(states: Sequence[Tensor], past: int = 0) -> Tensor:
        q, k, v = states
        mask = segments.mask(q.shape[2], past, window, q) if past or window is not None or needs_mask else None
        return attend(module, q, k, v, mask, is_causal=mask is None, **kwargs)[0]

    states = (query, key, value)
    outputs = []
    for span in segments.spans:
        if len(span.ends) == 1:  # one completion: prompt and completion are one causal sequence
            outputs.append(call(_slice(states, span.start, span.end)))
            continue
        if span.prefix > span.start:
            outputs.append(call(_slice(states, span.start, span.prefix)))
        outputs += (_together if segments.together(span) else _one_by_one)(call, states, span)
    return torch.cat(outputs, dim=1)


def _slice(states: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
    return [state[:, :, start:end] for state in states]


def _one_by_one(call: Callable[..., Tensor], states: Sequence[Tensor], span: Span) -> list[Tensor]:
    """Call for each run by itself, without padding."""
    prompt = _slice(states, span.start, span.prefix)[1:]
    outputs = []
    for (start, end), before in zip(pairwise((span.prefix, *span.ends)), span.before, strict=True):
        query, *own = _slice(states, start, end)
        above = [_slice(states, *place)[1:] for place in before]
        key, value = (torch.cat(parts, dim=2) for parts in zip(prompt, *above, own, strict=True))
        outputs.append(call((query, key, value), key.shape[2] - query.shape[2]))
    return outputs


def _together(call: Callable[..., Tensor], states: Sequence[Tensor], span: Span) -> list[Tensor]:
    """Call once for all completions, padded to one length. Each asks for the runs that it shares, too."""
    rows = len(span.padded)
    _, keys, values = (state.expand(rows, -1, -1, -1) for state in _slice(states, span.start, span.prefix))
    query, key, value = (_rows(state, span) for state in states)
    key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    padded = call((query, key, value), keys.shape[2])
    return [padded.flatten(0, 1).index_select(0, span.unpadded).unsqueeze(0)]


def _rows(states: Tensor, span: Span) -> Tensor:
    """Gather the group's completions: (1, heads, N, D) -> (rows, heads, T, D)."""
    taken = states[0].index_select(1, span.padded.flatten())
    return taken.view(states.shape[1], *span.padded.shape, states.shape[-1]).transpose(0, 1)


def _causal_mask(length: int, past: int, window: int | None, like: Tensor) -> Tensor:
    """Mask to add to the scores, (1, 1, length, past + length): 0 where a token may look.

    The mask holds numbers because sdpa would turn booleans into numbers at every call.
    """
    queries = torch.arange(past, past + length, device=like.device).unsqueeze(1)
    keys = torch.arange(past + length, device=like.device)
    allowed = keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~allowed, torch.finfo(like.dtype).min)[None, None]
