"""A padded batch with every oddity, and what each of its rows gives alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.packing.models import VOCABULARY

PROMPT, COMPLETION = 23, 17
LENGTHS = {23: (17, 0, 9, 1), 14: (2, 5), 1: (3, 4), 22: (6,)}  # prompt length: lengths of its completions


def padded_batch(lengths: dict[int, tuple[int, ...]] | None = None) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, L): completions of 0 and 1 tokens, prompts of many lengths, rows shuffled."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, completions in (lengths or LENGTHS).items():
        prompt = _tokens(length, generator)
        rows += [(prompt, _tokens(count, generator)) for count in completions]
    return _padded(rows, generator)


def forked_batch() -> tuple[Tensor, Tensor]:
    """As `padded_batch`, with completions of a prompt that begin alike, end early, fork twice, or are equal."""
    generator = torch.Generator().manual_seed(4)
    long, other, third, short = (_tokens(count, generator) for count in (17, 8, 6, 5))
    forked = torch.cat([long[:9], other])
    trees = {
        23: (long, forked, long[:9], long, other, torch.cat([forked[:13], third[:4]]), other[:1]),
        14: (short, short),
        9: (torch.cat([third, short]), third, short),
        1: (torch.cat([short, third]), torch.cat([short, other])),
    }
    prompts = {length: _tokens(length, generator) for length in trees}
    return _padded([(prompts[length], row) for length, rows in trees.items() for row in rows], generator)


def _tokens(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=generator)


def _padded(rows: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), PROMPT + COMPLETION, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        used = slice(PROMPT - len(prompt), PROMPT + len(completion))
        ids[row, used], mask[row, used] = torch.cat([prompt, completion]), 1
    order = torch.randperm(len(rows), generator=generator)
    return ids[order], mask[order]


def rows_alone(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T) log-probabilities of each row without any padding, through TRL's fused head; 0 at padding."""
    logps = []
    for row, seen in zip(ids, mask.bool(), strict=True):
        count = int(seen[PROMPT:].sum())
        if count == 0:
            logps.append(torch.zeros(COMPLETION))
            continue
        tokens = row[seen].unsqueeze(0)
        labels = tokens.clone()
        labels[:, :-count] = -100
        output = model(input_ids=tokens, labels=labels, fused_lm_head=True)
        logps.append(torch.nn.functional.pad(output.log_probs[0, -count:], (0, COMPLETION - count)))
    return torch.stack(logps)


def padded_output(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Any:
    """TRL's forward of the padded batch."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-COMPLETION] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)


def rows_padded(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T) log-probabilities as TRL computes them."""
    return padded_output(model, ids, mask).log_probs[:, -COMPLETION:]


def gradients(model: PreTrainedModel, logps: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the gradient of a random sum of them with respect to every parameter, in one vector."""
    weights = torch.randn(COMPLETION, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    values = logps()
    (values * weights).sum().backward()
    flat = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    return values.detach(), torch.cat([gradient.flatten() for gradient in flat])
