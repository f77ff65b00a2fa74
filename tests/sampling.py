"""Completions and their log-probabilities, sampled by transformers as an engine would sample them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def sampled(model: Any, rows: Sequence[Tensor], params: Any, *, seed: int) -> list[tuple[list[int], list[float]]]:
    """The tokens of each row's completion, to its end, and what the sampler gave them.

    Args:
        rows: token ids of the prompts.
        params: `temperature`, `max_tokens` and the like, as vLLM names them.
    """
    length = max(map(len, rows))
    ids = torch.stack([pad(row, (length - len(row), 0), value=0) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            temperature=params.temperature,
            max_new_tokens=params.max_tokens,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[:, length:]
        logps = torch.stack(output.scores, 1).float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    end = model.config.eos_token_id
    return [_to_its_end(*row, end) for row in zip(tokens.tolist(), logps.tolist(), strict=True)]


def _to_its_end(tokens: list[int], logps: list[float], end: int) -> tuple[list[int], list[float]]:
    count = tokens.index(end) + 1 if end in tokens else len(tokens)
    return tokens[:count], logps[:count]
