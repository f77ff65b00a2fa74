"""Specification of attention in a row with its shared prompts first: one mask, one softmax, and autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_plus.packing.prompts_first import Block


def shared_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a completion to its prompt and causally to itself, and of a prompt causally to itself.

        out_i = Σ_j exp(scale q_i·k_j) v_j / (exp(sink) + Σ_j exp(scale q_i·k_j)), over the tokens j that i may look at

    Args:
        query: (N, heads, D).
        key, value: (N, heads of keys, D). Query heads share the keys' heads in equal parts.
        blocks: places of the groups, from `pack_prompts_first`.
        window: number of tokens that a token sees, itself among them.
        sinks: (heads,). None leaves exp(sink) out.

    Returns:
        (N, heads, D).
    """
    shared = query.shape[1] // key.shape[1]
    scores = torch.einsum("ihd,jhd->hij", query, key.repeat_interleave(shared, dim=1)) * scale
    scores = scores.masked_fill(~visible(blocks, len(query), window).to(query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, len(query), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hij,jhd->ihd", weights, value.repeat_interleave(shared, dim=1))


def visible(blocks: Sequence[Block], tokens: int, window: int | None = None) -> Tensor:
    """(N, N) booleans: whether the token of a row may look at the token of a column."""
    sequence, position = torch.zeros(2, tokens, dtype=torch.long)
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    names = iter(range(1, tokens + 1))
    for block in blocks:
        prompt = slice(*block.prompt)
        sequence[prompt], position[prompt] = next(names), torch.arange(block.shared)
        for before, (start, end) in zip(block.before, block.runs, strict=True):
            first = block.shared + sum(stop - begin for begin, stop in before)
            sequence[start:end], position[start:end] = next(names), torch.arange(first, first + end - start)
            for place in (block.prompt, *before):
                sees[start:end, slice(*place)] = True
    distance = position.unsqueeze(1) - position
    sees |= (sequence.unsqueeze(1) == sequence) & (distance >= 0)
    return sees if window is None else sees & (distance < window)
