"""Forms that put all groups into one row: segment attention and cascade attention, with the prompt shared or not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.packing.attention import Segments, install_segments
from grpo_plus.packing.cascade import Cascade, cascade_of
from grpo_plus.packing.forward import Form, Head, Logps, Pass, Ready, Tokens, score
from grpo_plus.packing.layout import Group, Span, holders, pack, scored
from grpo_plus.packing.prompts_first import pack_prompts_first, prompts_first


@dataclass(frozen=True)
class _OneRow:
    """All groups in one row.

    no_mask: (1, 1, 1, 1) zeros. transformers hands a 4D mask through, and would build one of N x N from the positions.
    holders: (M,) which value of the row is that of each scored token. None for each its own.
    spans, cascade: what the attention layers are told, one of the two.
    """

    tokens: Tokens
    no_mask: Tensor
    holders: Tensor | None
    spans: tuple[Span, ...] = ()
    cascade: Cascade | None = None


def pairs_per_call(device: torch.device) -> float:
    """Pairs of query and key whose attention takes as long as the overhead of a call, forward and backward."""
    # On a CPU a pair takes about 0.15 us (four heads of 64), a call 0.3 ms. On a GPU a launch outweighs any padding.
    return 2000.0 if device.type == "cpu" else float("inf")


def _segments(groups: Sequence[Group], device: torch.device) -> Ready:
    row = pack(groups)
    tokens = Tokens.of(row.input_ids, row.position_ids, row.shift_labels)
    call = _OneRow(tokens, torch.zeros(1, 1, 1, 1), holders(groups), spans=row.spans)
    return Ready(call, *scored(groups), row.input_ids.numel())


def _cascade(groups: Sequence[Group], device: torch.device) -> Ready:
    groups = prompts_first(groups)
    row = pack_prompts_first(groups)
    tokens = Tokens.of(row.input_ids, row.position_ids, row.shift_labels)
    call = _OneRow(tokens, torch.zeros(1, 1, 1, 1), holders(groups), cascade=cascade_of(row.blocks))
    return Ready(call, *scored(groups), row.input_ids.numel())


def _passes(row: _OneRow, head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[Pass]:
    yield partial(_run, row, head, model, forward)


def _run(row: _OneRow, head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]) -> Logps:
    install_segments(model)
    # Segments are made anew: their masks would live as long as the rows.
    segments = row.cascade or Segments(row.spans, pairs_per_call=pairs_per_call(model.device))
    values = score(model, forward, head, row.tokens, attention_mask=row.no_mask, segments=segments)
    if row.holders is None:
        return values
    logps, entropies = (value.index_select(0, row.holders) for value in values)
    return logps, entropies


def _packed_tokens(groups: Sequence[Group], device: torch.device) -> int:
    return sum(group.tokens for group in groups)


def _prompts_first_tokens(groups: Sequence[Group], device: torch.device) -> int:
    return _packed_tokens(prompts_first(groups), device)


SEGMENTS = Form("shared_prompt", "segment attention", True, _segments, _passes, _packed_tokens)
CASCADE = Form("shared_prompt", "cascade attention", True, _cascade, _passes, _prompts_first_tokens)
PADDING_FREE = Form("padding_free", "segment attention", False, _segments, _passes, _packed_tokens)
PADDING_FREE_FLASH = Form("padding_free", "flash attention", False, _cascade, _passes, _prompts_first_tokens)
