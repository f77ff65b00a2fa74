"""Completions of lengths that were fixed beforehand, so that both sides of a benchmark generate the same work."""

import torch
from torch import Tensor
from transformers import LogitsProcessor


class FixedLengths(LogitsProcessor):
    """Lets each row end exactly at its length. Everything else is drawn as the model has it.

    Args:
        lengths: for each batch that is generated, in order, one length per row, the end-of-sequence token included.
    """

    def __init__(self, lengths: list[Tensor], eos: int) -> None:
        self._lengths = iter(lengths)
        self._eos = eos
        self._prompt = self._seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Forbid the end before a row's length, and everything but the end there."""
        length = input_ids.shape[1]
        if not self._prompt or length <= self._seen:
            self._prompt, self._current = length, next(self._lengths).to(scores.device)
        self._seen = length
        ends = self._current <= length - self._prompt + 1
        end = scores[:, self._eos].masked_fill(~ends, float("-inf"))
        scores = scores.masked_fill(ends[:, None], float("-inf"))
        scores[:, self._eos] = torch.where(ends, 0.0, end)
        return scores


def lognormal(rows: int, longest: int, generator: torch.Generator, *, mean: float = 0.4) -> Tensor:
    """(rows,) lengths with a long tail, `mean` of the longest on average before the cut, from 1 to the longest."""
    spread = 0.7
    center = torch.tensor(mean * longest).log() - spread**2 / 2
    drawn = (center + spread * torch.randn(rows, generator=generator)).exp()
    return drawn.round().long().clamp(1, longest)


def geometric(rows: int, longest: int, generator: torch.Generator, *, mean: float = 0.45) -> Tensor:
    """(rows,) lengths of rows that end with the same probability at every token, from 1 to the longest."""
    uniform = torch.rand(rows, generator=generator).clamp(min=1e-9)
    chance = torch.tensor(1 / (mean * longest))
    return (uniform.log() / torch.log1p(-chance)).ceil().long().clamp(1, longest)
