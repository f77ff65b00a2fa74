"""What the model wrote in completions of several turns, and what was recorded of it while it did.

TRL generates once for the first turn of all rows, and once more for the rows that a tool has answered. A row's later
prompt is its first one with all that the completion holds until then. So a turn is found by what it has read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_plus.kernels.linear_logprob.kept import KeptRows
from grpo_plus.rollout.recorder import Recorder, shares

Rows = Sequence[list[int]]
Kind = TypeVar("Kind", bound=Recorder)
Table = TypeVar("Table")


@dataclass(frozen=True)
class Generation:
    """Token ids that the rows of one generation read, and those that they wrote."""

    prompt_ids: Rows
    completion_ids: Rows


@dataclass(frozen=True)
class Piece:
    """Tokens of a completion that one generation wrote.

    row: the completion.
    start: index of the first token in the completion.
    length: number of tokens. The generation may have written more, of which TRL has cut the end.
    source: row of the generation.
    """

    row: int
    start: int
    length: int
    source: int


@dataclass(frozen=True)
class Written:
    """Completions, and which generation wrote which part of them.

    pieces: of each generation.
    completion_ids: of B completions.
    """

    generations: list[Generation]
    pieces: list[list[Piece]]
    completion_ids: Rows

    @classmethod
    def of(
        cls, generations: list[Generation], prompt_ids: Rows, completion_ids: Rows, masks: Rows | None
    ) -> "Written | None":
        """Find what the generations wrote. None where others have written some of what the policy is trained on.

        Args:
            masks: of the completions, 0 at the tokens that a tool wrote. None where there are none.
        """
        runs = [list(policy_runs(mask)) for mask in masks or [[1] * len(ids) for ids in completion_ids]]
        pieces: list[list[Piece]] = []
        for turn, generation in enumerate(generations):
            sources = enumerate(zip(generation.prompt_ids, generation.completion_ids, strict=True))
            pieces.append([])
            for row, (start, length) in ((row, its[turn]) for row, its in enumerate(runs) if turn < len(its)):
                read = [*prompt_ids[row], *completion_ids[row][:start]]
                wrote = completion_ids[row][start : start + length]
                # Both are in the same order: a generation's row that does not fit has written nothing that is left.
                fits = (source for source, (prompt, ids) in sources if prompt == read and ids[:length] == wrote)
                if (source := next(fits, None)) is None:
                    return None
                pieces[-1].append(Piece(row, start, length, source))
        known = sum(len(each) for each in pieces) == sum(len(each) for each in runs)
        return cls(generations, pieces, completion_ids) if known else None

    @property
    def in_one_piece(self) -> bool:
        """Whether each completion is what the one generation wrote in its row."""
        alone = len(self.generations) == 1 and len(self.pieces[0]) == len(self.completion_ids)
        return alone and not any(piece.start for piece in self.pieces[0])

    @property
    def length(self) -> int:
        """T, tokens of the longest completion."""
        return max(map(len, self.completion_ids))

    def tables(
        self, recorders: Sequence[Kind], table: Callable[[list[tuple[Kind, Rows]]], Table]
    ) -> list[Table] | None:
        """What was recorded of each generation. None where somebody else has generated some of it.

        Args:
            table: makes one of the generation's recorders and the completions of each.
        """
        left, tables = iter(recorders), []
        for generation in self.generations:
            own: list[Kind] = []
            rows = len(generation.completion_ids)
            while sum(recorder.size for recorder in own) < rows and (recorder := next(left, None)) is not None:
                own.append(recorder)
            parts = shares(own, generation.completion_ids)
            if parts is None:
                return None
            tables.append(table(parts))
        return tables

    def placed_logps(self, tables: list[Tensor]) -> Tensor:
        """(B, T) out of each generation's (rows, tokens). NaN at the tokens of others."""
        placed = tables[0].new_full((len(self.completion_ids), self.length), torch.nan)
        for table, pieces in zip(tables, self.pieces, strict=True):
            for piece in pieces:
                placed[piece.row, piece.start : piece.start + piece.length] = table[piece.source, : piece.length]
        return placed

    def placed_kept(self, tables: list[KeptRows]) -> KeptRows:
        """The kept sets of whole completions. Nothing is left out at the tokens of others."""
        counts = tables[0].counts.new_zeros(len(self.completion_ids), self.length)
        lists = [[tables[0].ids[:0, 0]] for _ in self.completion_ids]
        for table, pieces in zip(tables, self.pieces, strict=True):
            ends = table.counts.abs().cumsum(1).tolist()
            for piece in pieces:
                end = piece.start + piece.length
                counts[piece.row, piece.start : end] = table.counts[piece.source, : piece.length]
                lists[piece.row].append(table.ids[piece.source, : ends[piece.source][piece.length - 1]])
        return KeptRows(counts, pad_sequence([torch.cat(row) for row in lists], batch_first=True))


def policy_runs(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of ones, which the policy has written without a break."""
    for by_policy, run in groupby(range(len(mask)), key=lambda place: bool(mask[place])):
        places = list(run)
        if by_policy:
            yield places[0], len(places)
