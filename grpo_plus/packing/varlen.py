"""Attention of many sequences of unlike lengths in one call: torch's own flash kernels, or the same in plain torch.

The two functions are forward and backward of one operator, whose log-sum-exp the caller gets. The public
`torch.nn.attention.varlen.varlen_attn` does not let a gradient through its log-sum-exp. Plain torch takes every device
and dtype, float64 too. It is the specification of the kernels, and what runs where they cannot.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sequences:
    """Which queries meet which keys: the queries of each sequence meet the keys of the same sequence.

    queries, keys: (sequences + 1,) int32, where the sequences begin, and the end.
    longest_queries, longest_keys: tokens of the longest sequence.
    causal: whether a query sees no later key. The last query and the last key of a sequence stand at the same place.
    window: number of keys that a causal query sees, its own among them. None for all.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    causal: bool
    window: int | None = None


def why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why torch's flash kernels cannot run. None where they can."""
    if device.type != "cuda":
        return f"torch's flash attention needs a CUDA device, not {device.type}"
    if not torch.backends.cuda.is_flash_attention_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return "torch has no flash attention for this card"
    if dtype not in HALF:
        return f"torch's flash attention computes in half precision, not in {str(dtype).removeprefix('torch.')}"
    return None


def why_not_windows(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why a window over more keys than queries comes out wrong. None where it is right.

    The rows of the self-check are shorter than most models' windows, and would not tell.
    """
    ends = torch.tensor([0, 3, 9], dtype=torch.int32), torch.tensor([0, 6, 20], dtype=torch.int32)
    where = Sequences(ends[0].to(device), ends[1].to(device), 6, 14, causal=True, window=4)
    there = Sequences(*ends, 6, 14, causal=True, window=4)
    query, key, value, grad = (
        torch.arange(float(rows * heads * 32)).mul(step).sin().view(rows, heads, 32)
        for rows, heads, step in ((9, 2, 0.7), (20, 1, 0.9), (20, 1, 1.1), (9, 2, 1.3))
    )
    expected, lse = _plain_forward(query, key, value, there, 0.2)
    right = expected, *_plain_backward(grad, query, key, value, expected, lse, there, 0.2)
    q, k, v, g = (states.to(device, dtype) for states in (query, key, value, grad))
    try:
        out, lse, state = forward(q, k, v, where, 0.2)
        found = out, *backward(g, q, k, v, out, lse, where, 0.2, state)
    except (RuntimeError, TypeError) as failure:
        return f"torch's flash attention has no windows here: {failure}"
    errors = [float((a.cpu().float() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
    return None if max(errors) < 0.05 else "torch's flash attention gets windows wrong here"


def forward(query: Tensor, key: Tensor, value: Tensor, where: Sequences, scale: float) -> tuple[Tensor, Tensor, Any]:
    """Output (N, heads, D), log-sum-exp of the scores (heads, N), and the state that `backward` wants back.

    Args:
        query: (N, heads, D).
        key, value: (n, heads of keys, D). Query heads share the keys' heads in equal parts.
    """
    if query.is_cuda and query.dtype in HALF:
        return _flash_forward(query, key, value, where, scale)
    return *_plain_forward(query, key, value, where, scale), ()


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    where: Sequences,
    scale: float,
    state: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    With p = exp(score - lse) and delta = sum(grad * out): a caller who has merged these keys with others gives the
    merged `out` and `lse`, and gets this part of the whole softmax's gradients.
    """
    if query.is_cuda and query.dtype in HALF:
        return _flash_backward(grad, query, key, value, out, lse, where, scale, state)
    return _plain_backward(grad, query, key, value, out, lse, where, scale)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, where: Sequences, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_arguments(where), False, scale=scale, **_window(where)
    )
    return out, lse, state


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    where: Sequences,
    scale: float,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, *_arguments(where), *state, scale=scale, **_window(where)
    )
    return gradients


def _arguments(where: Sequences) -> tuple[Any, ...]:
    # For queries of one token each, the kernel would exchange heads and tokens, in its log-sum-exp too.
    return where.queries, where.keys, max(2, where.longest_queries), where.longest_keys, 0.0, where.causal


def _window(where: Sequences) -> dict[str, int]:
    return {} if where.window is None else {"window_size_left": where.window - 1, "window_size_right": 0}


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, where: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    wide, out = _wide(query), torch.zeros_like(query)
    lse = query.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=wide)
    with torch.autocast(query.device.type, enabled=False):
        for i, j in _slices(where):
            scores = _scores(query[i], key[j], where, scale)
            lse[:, i] = scores.logsumexp(-1)
            out[i] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), _repeated(value[j], query)).to(out.dtype)
    return out, lse


def _plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, where: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(query)
    dq, dk, dv = (torch.zeros_like(states) for states in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        delta = (grad.to(wide) * out.to(wide)).sum(-1).t()  # (heads, N)
        for i, j in _slices(where):
            p = torch.exp(_scores(query[i], key[j], where, scale) - lse[:, i, None])
            dp = torch.einsum("ihd,jhd->hij", grad[i].to(wide), _repeated(value[j], query))
            ds = p * (dp - delta[:, i, None]) * scale
            dq[i] = torch.einsum("hij,jhd->ihd", ds, _repeated(key[j], query)).to(dq.dtype)
            dk[j] = _summed(torch.einsum("hij,ihd->jhd", ds, query[i].to(wide)), key).to(dk.dtype)
            dv[j] = _summed(torch.einsum("hij,ihd->jhd", p, grad[i].to(wide)), key).to(dv.dtype)
    return dq, dk, dv


def _slices(where: Sequences) -> Iterator[tuple[slice, slice]]:
    queries, keys = where.queries.tolist(), where.keys.tolist()
    for index in range(len(queries) - 1):
        yield slice(queries[index], queries[index + 1]), slice(keys[index], keys[index + 1])


def _scores(query: Tensor, key: Tensor, where: Sequences, scale: float) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", query.to(_wide(query)), _repeated(key, query)) * scale
    if not where.causal:
        return scores
    last = torch.arange(len(query), device=query.device).unsqueeze(1) + len(key) - len(query)
    keys = torch.arange(len(key), device=query.device)
    hidden = keys > last
    if where.window is not None:
        hidden |= keys <= last - where.window
    return scores.masked_fill(hidden, -torch.inf)


def _repeated(states: Tensor, query: Tensor) -> Tensor:
    return states.to(_wide(query)).repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def _summed(gradient: Tensor, states: Tensor) -> Tensor:
    """Sum over the query heads that share a head of keys."""
    return gradient.unflatten(1, (states.shape[1], -1)).sum(2)


def _wide(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
