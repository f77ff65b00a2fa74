"""Cascade attention: two flash calls a layer for any number of prompts and completions.

    own     every prompt and every run of completions, causally on itself
    shared  all completions of a prompt, as one sequence of queries, on the prompt

The log-sum-exps of the two parts say how much of the whole softmax each part is, so the outputs merge exactly. Nothing
is padded, masked or repeated, and the prompt's keys are there once. The backward is flash attention's own, of each part
with the merged output and log-sum-exp. In a layer with a sliding window a completion sees the end of its prompt alone:
there each completion gets a copy of these keys, and one call does it all. Where completions share a run beyond the
prompt (`tree.py`), each run gets a copy of the keys between the prompt and it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from grpo_plus.models.layers import why_not_packed_row, window_of
from grpo_plus.packing import varlen
from grpo_plus.packing.layout import Range
from grpo_plus.packing.prompts_first import Block
from grpo_plus.packing.transfer import on_device
from grpo_plus.packing.varlen import Sequences, why_not_flash


@dataclass(frozen=True)
class Cascade:
    """What the attention layers know of a row with its shared prompts first.

    own: every prompt and run as a sequence. A completion without a shared prompt is in one sequence with it.
    shared: the completions of each shared prompt, and the prompt. None where no prompt is shared.
    prompts: tokens of the shared prompts, at the beginning of the row.
    first: the first token of a completion that shares its prompt. All later tokens are such completions.
    reach: one past the highest position. A window of at least this many tokens hides nothing.
    keys: where the keys of `own` stand. None where they stand as their queries do.
    blocks: places of prompts and completions, on the host.
    windowed: for each window, the sequences of all queries with the keys that they see, and where these keys stand.
    """

    own: Sequences
    shared: Sequences | None
    prompts: int
    first: int
    reach: int
    keys: Tensor | None
    blocks: tuple[Block, ...]
    windowed: dict[int, tuple[Sequences, Tensor]] = field(default_factory=dict)

    def within(self, window: int) -> tuple[Sequences, Tensor]:
        """Sequences and keys of a layer whose window hides tokens, made once."""
        if window not in self.windowed:
            self.windowed[window] = on_device(_sequences(self.blocks, window), self.own.queries.device)
        return self.windowed[window]


def why_not_cascade(model: PreTrainedModel) -> str | None:
    """Reason why cascade attention cannot replace the model's. With None it may; the self-check decides."""
    config: Any = model.config.get_text_config()
    dtype = _dtype(model.device.type, model.dtype)
    if reason := why_not_flash(model.device, dtype):
        return reason
    if getattr(config, "sliding_window", None) and (reason := varlen.why_not_windows(model.device, dtype)):
        return reason
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "torch's flash attention has no soft cap for scores"
    if getattr(config, "attention_dropout", 0.0) and model.training:
        return "cascade attention has no dropout"
    return why_not_packed_row(model)


def _dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of attention, which autocast computes in its own dtype where it is on."""
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else dtype


def cascade_of(blocks: Sequence[Block]) -> Cascade:
    """Describe a row from `pack_prompts_first` to the attention layers, with tensors on the CPU."""
    sharing = [block for block in blocks if block.shared]
    own, keys = _sequences(blocks, None)
    first, shared = max(block.ends[-1] for block in blocks), None
    if sharing:
        first = sharing[0].start
        completions = _ends([block.ends[-1] - first for block in sharing])
        prompts = _ends([block.prompt_end for block in sharing])
        longest = max(sum(block.lengths) for block in sharing), max(block.shared for block in sharing)
        shared = Sequences(completions, prompts, *longest, causal=False)
    return Cascade(
        own=own,
        shared=shared,
        prompts=max((block.prompt_end for block in sharing), default=0),
        first=first,
        reach=max(block.shared + block.longest for block in blocks),
        keys=keys if any(before for block in blocks for before in block.before) else None,
        blocks=tuple(blocks),
    )


def _ends(ends: Iterable[int]) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def _sequences(blocks: Sequence[Block], window: int | None) -> tuple[Sequences, Tensor]:
    """All queries, and the keys of each sequence: those before it, then its own.

    Args:
        window: with a window, what it reaches of prompt and runs. Without, the runs between the prompt and it.
    """
    seen: list[list[Range]] = [[block.prompt] for block in blocks if block.shared]
    for block in sorted(blocks, key=lambda block: block.start):
        for before, own in zip(block.before, block.runs, strict=True):
            seen.append([*(before if window is None else _tail([block.prompt, *before], window - 1)), own])
    queries = [end - start for *_, (start, end) in seen]
    keys = [sum(end - start for start, end in sequence) for sequence in seen]
    index = torch.cat([torch.arange(start, end) for sequence in seen for start, end in sequence])
    from_query, from_key = _ends(accumulate(queries)), _ends(accumulate(keys))
    return Sequences(from_query, from_key, max(queries), max(keys), causal=True, window=window), index


def _tail(ranges: Sequence[Range], tokens: int) -> list[Range]:
    """The last tokens of ranges laid end to end."""
    kept = []
    for start, end in reversed(ranges):
        kept.append((max(start, end - tokens), end))
        tokens -= end - kept[-1][0]
    return kept[::-1]


def cascade_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, cascade: Cascade, **kwargs: Any
) -> Tensor:
    """Attention of a row with its shared prompts first.

    Args:
        query: (1, heads, N, D), D the width of a head.
        key, value: (1, heads of keys, N, D).

    Returns:
        (1, N, heads, D), as transformers' attention functions do.

    Raises:
        ValueError: the layer wants dropout or a soft cap.
    """
    if kwargs.get("dropout") or kwargs.get("softcap") is not None:
        raise ValueError(f"cascade attention has no dropout and no soft cap, which {type(module).__name__} asks for")
    dtype = _dtype(query.device.type, query.dtype)
    q, k, v = (states.squeeze(0).transpose(0, 1).to(dtype) for states in (query, key, value))
    own, shared, keys = cascade.own, cascade.shared, cascade.keys
    window = window_of(module, kwargs)
    if window is not None and window < cascade.reach:
        shared = None
        own, keys = cascade.within(window)
    if keys is not None:  # the shared prompts stand first among them, too
        k, v = k.index_select(0, keys), v.index_select(0, keys)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    parts = _Parts(own, shared, cascade.prompts, cascade.first, scale)
    out: Tensor = _Attention.apply(q, k, v, kwargs.get("s_aux"), parts)
    return out.unsqueeze(0)


@dataclass(frozen=True)
class _Parts:
    """The two calls of a layer. Keys of the second are the first `prompts`, its queries those from `first` on."""

    own: Sequences
    shared: Sequences | None
    prompts: int
    first: int
    scale: float


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, parts: _Parts) -> Tensor:
        out, lse, ctx.state = varlen.forward(q, k, v, parts.own, parts.scale)
        if parts.shared is not None:
            over = q[parts.first :], k[: parts.prompts], v[: parts.prompts]
            there, lse_there, ctx.shared_state = varlen.forward(*over, parts.shared, parts.scale)
            _merge(out[parts.first :], lse[:, parts.first :], there, lse_there)
        if sinks is not None:
            own = lse
            lse = torch.logaddexp(own, sinks.to(own.dtype).unsqueeze(1))
            out.mul_(_by_token((own - lse).exp_()))
        ctx.parts = parts
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        parts: _Parts = ctx.parts
        grad = grad.contiguous()
        dq, dk, dv = varlen.backward(grad, q, k, v, out, lse, parts.own, parts.scale, ctx.state)
        if parts.shared is not None:
            first, prompts = parts.first, parts.prompts
            over = grad[first:], q[first:], k[:prompts], v[:prompts], out[first:], lse[:, first:].contiguous()
            more = varlen.backward(*over, parts.shared, parts.scale, ctx.shared_state)
            for whole, part in zip((dq[first:], dk[:prompts], dv[:prompts]), more, strict=True):
                whole.add_(part)
        sink_gradient = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # A sink is a score whose value is 0: its share of the softmax takes from every output.
            delta = (grad * out).sum(-1, dtype=lse.dtype).t()  # (heads, N)
            share = torch.exp(sinks.to(lse.dtype).unsqueeze(1) - lse)
            sink_gradient = (share * delta).sum(1).neg_().to(sinks.dtype)
        return dq, dk, dv, sink_gradient, None


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge a softmax over some keys with another over other keys, in place.

    Both shares are sigmoids, in full precision: 1 - share would leave the smaller of them without digits.

    Args:
        out, other: (n, heads, D).
        lse, other_lse: (heads, n) log-sum-exps of the scores behind them.
    """
    lead = lse - other_lse
    torch.logaddexp(lse, other_lse, out=lse)
    out.mul_(_by_token(lead.sigmoid())).addcmul_(other, _by_token(lead.neg_().sigmoid_()))


def _by_token(values: Tensor) -> Tensor:
    """(heads, n) -> (n, heads, 1)."""
    return values.t().unsqueeze(-1)
