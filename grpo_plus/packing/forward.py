"""Forms of packed rows: log-probabilities of a model's completions without padding.

A form turns groups of rows into calls of the model, and returns one value per scored token, in packed order. The form
runs *inside* the forward of the outermost module (DDP, mixed precision), handed in by `model(packed=call)`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.packing.attention import Segments, install_segments
from grpo_plus.packing.cached import PromptReader, PromptRecord, checkpoints_with_cache
from grpo_plus.packing.layout import IGNORED, Group, Span, pack, passes

# Cost of a pass beside its tokens, counted in tokens, on a CPU, forward and backward. Completions go through the cache
# in parts of similar length where a further part saves more padding than this.
PASS_TOKENS = 64

Logps = tuple[Tensor, Tensor]  # log-probabilities and entropies, (M,) each, of M scored tokens in packed order
Head = Callable[[PreTrainedModel, Tensor, Tensor], Logps]  # base model, (M, H) hidden states, (M,) targets
PackedCall = Callable[[PreTrainedModel, Callable[..., Any]], Logps]


def install_packed_forward(model: PreTrainedModel) -> None:
    """Let `model(packed=call)` run `call(model, forward)` in place of its forward. TRL adds its fused head this way."""
    before = model.forward
    if "packed" in inspect.signature(before, follow_wrapped=False).parameters:
        return  # another trainer has had this model

    @wraps(before)
    def packed_forward(self: PreTrainedModel, *args: Any, packed: PackedCall | None = None, **kwargs: Any) -> Any:
        # A copy of the model brings this function along and must not compute with the original's weights.
        forward = MethodType(before.__func__, self) if isinstance(before, MethodType) else before
        return forward(*args, **kwargs) if packed is None else packed(self, forward)

    model.forward = MethodType(packed_forward, model)


@dataclass(frozen=True)
class Form:
    """A way to forward groups of rows.

    run: call inside the model's forward, (groups, head, base model, its forward) -> Logps. `head=None` means the
        model's fused head.
    share: whether completions of one prompt go together.
    tokens: number of tokens that the form forwards for these groups.
    """

    name: str
    detail: str
    share: bool
    run: Callable[[Sequence[Group], Head | None, PreTrainedModel, Callable[..., Any]], Logps]
    tokens: Callable[[Sequence[Group]], int]

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Groups as `run` and `tokens` take them."""
        return list(groups) if self.share else [row for group in groups for row in group.apart()]


def _run_segments(
    groups: Sequence[Group], head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]
) -> Logps:
    install_segments(model)
    row, device = pack(groups), model.device
    return _score(
        model,
        forward,
        head,
        row.shift_labels,
        input_ids=row.input_ids.to(device),
        position_ids=row.position_ids.to(device),
        # transformers hands a 4D mask through. Without a mask it would build one of N x N from the positions.
        attention_mask=torch.zeros(1, 1, 1, 1, device=device),
        segments=Segments(tuple(_on(span, device) for span in row.spans), pairs_per_call=pairs_per_call(device)),
    )


def pairs_per_call(device: torch.device) -> float:
    """Pairs of query and key whose attention takes as long as the overhead of a call, forward and backward."""
    # On a CPU a pair takes about 0.15 us (four heads of 64), a call 0.3 ms. On a GPU a launch outweighs any padding.
    return 2000.0 if device.type == "cpu" else float("inf")


def _on(span: Span, device: torch.device) -> Span:
    return replace(span, padded=span.padded.to(device), unpadded=span.unpadded.to(device))


def _run_cached(
    groups: Sequence[Group], head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]
) -> Logps:
    with checkpoints_with_cache(model):
        parts = [_run_group(group, head, model, forward) for group in groups]
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropies for _, entropies in parts])


def _run_group(group: Group, head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]) -> Logps:
    shared, record = len(group.prompt) - 1, PromptRecord(model.config.get_text_config())
    if shared:
        model.base_model(
            input_ids=group.prompt[None, :-1].to(model.device),
            position_ids=torch.arange(shared, device=model.device)[None],
            past_key_values=record,
            use_cache=True,
        )
    parts = passes(_cached_lengths(group), PASS_TOKENS)
    scores = [_run_completions(group, rows, record, head, model, forward) for rows in parts]
    order = [row for rows in parts for row in rows]
    logps, entropies = (_in_order(torch.cat(values), group, order) for values in zip(*scores, strict=True))
    return logps, entropies


def _run_completions(
    group: Group,
    rows: Sequence[int],
    record: PromptRecord,
    head: Head | None,
    model: PreTrainedModel,
    forward: Callable[..., Any],
) -> Logps:
    """Run some of the group's completions, padded to one length, after its prompt."""
    shared, length = len(group.prompt) - 1, max(_cached_lengths(group)[row] for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        completion = group.completions[row]
        ids[index, : len(completion)] = group.continuation(row)
        labels[index, : len(completion)] = completion
    return _score(
        model,
        forward,
        head,
        labels,
        input_ids=ids.to(model.device),
        position_ids=torch.arange(shared, shared + length, device=model.device).expand(len(rows), -1),
        past_key_values=PromptReader(model.config.get_text_config(), record, len(rows), shared) if shared else None,
    )


def _in_order(values: Tensor, group: Group, order: Sequence[int]) -> Tensor:
    """Put values of scored tokens into the group's order. They come row by row in the order given."""
    by_row = dict(zip(order, values.split([len(group.completions[row]) for row in order]), strict=True))
    return torch.cat([by_row[row] for row in range(len(order))])


def _cached_lengths(group: Group) -> list[int]:
    # A recurrent layer takes a single token for a step of generation and writes to its cache.
    return [max(2, len(completion)) for completion in group.completions]


def _score(
    model: PreTrainedModel, forward: Callable[..., Any], head: Head | None, labels: Tensor, **inputs: Any
) -> Logps:
    # The labels are on the CPU, where counting what is scored waits for no device.
    flat = labels.flatten()
    scored = (flat != IGNORED).nonzero().squeeze(1)
    places = scored.to(model.device)
    if head is not None:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return head(model, hidden.index_select(0, places), flat[scored].to(model.device))
    output = forward(**inputs, shift_labels=labels.to(model.device), fused_lm_head=True)
    # A reference model's head computes no entropies, and nobody asks for them.
    entropies = torch.zeros_like(output.log_probs) if output.entropy is None else output.entropy
    return output.log_probs.flatten().index_select(0, places), entropies.flatten().index_select(0, places)


def _packed_tokens(groups: Sequence[Group]) -> int:
    return sum(group.tokens for group in groups)


def _cached_tokens(groups: Sequence[Group]) -> int:
    return sum(len(group.prompt) - 1 + _padded_tokens(_cached_lengths(group)) for group in groups)


def _padded_tokens(lengths: Sequence[int]) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in passes(lengths, PASS_TOKENS))


SEGMENTS = Form("shared_prompt", "segment attention", True, _run_segments, _packed_tokens)
CACHED = Form("shared_prompt", "two passes through the model's cache", True, _run_cached, _cached_tokens)
PADDING_FREE = Form("padding_free", "segment attention", False, _run_segments, _packed_tokens)
