"""The tokens that a sampler could draw, for a head whose probabilities are normalized over these tokens alone.

A sampler with top_p, top_k, min_p or suppressed tokens draws each token from a kept set S of the vocabulary,

    log πₛ(a) = log π(a) − log Σ_{v ∈ S} π(v)

S differs from token to token and is mostly small. It is therefore stored as a list of ids: of the tokens that are kept,
or of those that are left out where these are fewer. At most half of the vocabulary is listed, 2 V bytes a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Logit of a token that is left out. It is finite, also times a large number, so that its product with a probability of
# 0 is 0 and not NaN.
LEFT_OUT = -1e18


@dataclass(frozen=True)
class Kept:
    """Kept sets of N positions.

    ids: (E,) listed tokens.
    owners: (E,) the position whose list holds the id. N where none of the positions does.
    are_kept: (N,) bool, whether a position's list holds the tokens that are kept. Else it holds those left out.
    """

    ids: Tensor
    owners: Tensor
    are_kept: Tensor

    def left_out(self, part: slice, vocab: int) -> Tensor:
        """(n, V) bool of the positions in `part`: what the sampler could not draw. Waits for no device."""
        are_kept = self.are_kept[part]
        count, start = len(are_kept), part.start
        # One row more takes the lists of other positions: how many there are is not known on the host.
        inside = (self.owners >= start) & (self.owners < start + count)
        rows = torch.where(inside, self.owners - start, count)
        unlisted = torch.cat([are_kept, are_kept.new_zeros(1)])
        left_out = unlisted.unsqueeze(1).repeat(1, vocab)
        left_out[rows, self.ids] = ~unlisted[rows]
        return left_out[:count]


@dataclass(frozen=True)
class KeptRows:
    """Kept sets of padded completions. A row's lists stand one after the other.

    counts: (B, T) int32. n > 0: the next n ids of the row are kept. Otherwise -n ids are left out.
    ids: (B, W) int32, padded on the right with anything.
    """

    counts: Tensor
    ids: Tensor

    def at(self, rows: Tensor, columns: Tensor) -> Kept:
        """The kept sets of the tokens at (rows, columns), (N,) each. Waits for no device."""
        ends = self.counts.abs().cumsum(1)
        places = torch.arange(self.ids.shape[1], device=ends.device).expand(len(ends), -1).contiguous()
        column = torch.searchsorted(ends, places, right=True)  # T for padding
        number = torch.arange(len(rows), device=ends.device)
        position = number.new_full((len(ends), ends.shape[1] + 1), len(rows)).index_put((rows, columns), number)
        owners = position.gather(1, column).flatten()
        return Kept(self.ids.flatten().long(), owners, self.counts[rows, columns] > 0)

    def widened(self, length: int) -> Self:
        """The same rows with T = `length`. Nothing is left out at padding."""
        return type(self)(F.pad(self.counts, (0, length - self.counts.shape[1])), self.ids)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, padded to the longest."""
        return cls(_padded([part.counts for part in parts]), _padded([part.ids for part in parts]))


def _padded(tables: Sequence[Tensor]) -> Tensor:
    width = max(table.shape[1] for table in tables)
    return torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])
