"""Turn padded rows into groups that share a prompt, and groups into one packed row. Index arithmetic only.

A row of TRL's is [left padding, prompt, completion, right padding]. Completions of the same prompt form a group. A
group is laid out as

    prompt[:-1], then for each completion c: prompt[-1], c[:-1]

The prompt is there once, and each completion starts with a copy of the prompt's last token. Every position then has at
most one label, the next token of its own completion. Completions that begin alike are laid out as runs (`tree.py`), of
which each starts with a copy of the last token before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from grpo_plus.models.pictures import Pictures
from grpo_plus.packing.seen import Seen
from grpo_plus.packing.tree import Tree, prefix_tree

IGNORED = -100

Item = TypeVar("Item")


@dataclass(frozen=True)
class Group:
    """Completions of one prompt, without padding, on the CPU.

    prompt: (n,) token ids, n >= 1.
    rows: index of each completion's row in the padded batch.
    completions: (c,) token ids of each row, c >= 1.
    seen: what the prompt takes beside its tokens. None where no row of the batch has an image.
    """

    prompt: Tensor
    rows: tuple[int, ...]
    completions: tuple[Tensor, ...]
    seen: Seen | None = None

    @cached_property
    def tree(self) -> Tree:
        """What the completions share beyond the prompt."""
        return prefix_tree(self.completions)

    @property
    def tokens(self) -> int:
        """Tokens to forward when the prompt is shared, and what completions have in common."""
        return len(self.prompt) - 1 + self.tree.tokens

    def apart(self) -> "list[Group]":
        """Make each row a group of its own, with the prompt to itself."""
        pairs = zip(self.rows, self.completions, strict=True)
        return [replace(self, rows=(row,), completions=(completion,)) for row, completion in pairs]

    def continuation(self, index: int) -> Tensor:
        """Inputs that predict completion `index`, (c,): the prompt's last token, then all but the completion's last."""
        return torch.cat([self.prompt[-1:], self.completions[index][:-1]])

    @property
    def positions(self) -> Tensor:
        """Positions of the prompt's tokens: (n,), or (3, n) where the model places the tokens of an image on a grid."""
        if self.seen is None or self.seen.positions is None:
            return torch.arange(len(self.prompt))
        return self.seen.positions

    @property
    def prefix(self) -> "Piece":
        """The prompt without its last token."""
        return Piece(self.prompt[:-1], 0, None)

    @property
    def segments(self) -> "list[Piece]":
        """Each run of the completions, which starts with the last token before it."""
        shared = len(self.prompt) - 1
        return [
            Piece(
                self.continuation(run.row)[run.start : run.end],
                shared + run.start,
                self.completions[run.row][run.start : run.end],
            )
            for run in self.tree.runs
        ]


def merged(groups: Sequence[Group]) -> Group:
    """Groups of the same prompt as one group."""
    rows = [row for group in groups for row in group.rows]
    completions = [completion for group in groups for completion in group.completions]
    return replace(groups[0], rows=tuple(rows), completions=tuple(completions))


def runs(items: Iterable[Item], fits: Callable[[list[Item]], bool]) -> Iterator[list[Item]]:
    """Cut a sequence into runs that fit, each as long as possible. An item that does not fit is a run of its own."""
    run: list[Item] = []
    for item in items:
        if run and not fits([*run, item]):
            yield run
            run = []
        run.append(item)
    yield run


Range = tuple[int, int]  # of tokens in a packed row


@dataclass(frozen=True)
class Span:
    """Place of a group in a packed row: the shared prompt is [start, prefix), and the runs follow up to `ends`.

    before: for each run, the runs between the prompt and it.
    padded: (rows, T) index of the tokens of each completion that no other continues. A shorter one repeats its last
        token up to T.
    unpadded: (n,) index of the runs' n tokens among the rows * T padded tokens, in packed order.
    """

    start: int
    prefix: int
    ends: tuple[int, ...]
    before: tuple[tuple[Range, ...], ...]
    padded: Tensor
    unpadded: Tensor

    @property
    def end(self) -> int:
        """One past the group's last token."""
        return self.ends[-1]

    @property
    def padding_pairs(self) -> int:
        """Pairs of query and key that one padded call for all completions adds to a call for each run."""
        rows, length = self.padded.shape
        return (rows * length - (self.end - self.prefix)) * (self.prefix - self.start + length)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row: ids, the position of the first, and labels. None where nothing is scored."""

    ids: Tensor
    position: int
    labels: Tensor | None


@dataclass(frozen=True)
class Row:
    """Groups in one row of N tokens. Position ids restart in each group and after each prompt.

    input_ids, position_ids, shift_labels: (1, N). The label is -100 where nothing is scored.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece], *places: Any) -> Self:
        """Lay pieces end to end."""
        ids = torch.cat([piece.ids for piece in pieces])
        positions = torch.cat([torch.arange(p.position, p.position + len(p.ids)) for p in pieces])
        labels = [torch.full((len(p.ids),), IGNORED) if p.labels is None else p.labels for p in pieces]
        return cls(ids[None], positions[None], torch.cat(labels)[None], *places)


@dataclass(frozen=True)
class PackedRow(Row):
    """Groups laid end to end."""

    spans: tuple[Span, ...]


def group_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    *,
    rows: Iterable[int] | None = None,
    pictures: Pictures | None = None,
) -> list[Group] | None:
    """Group the rows that have something to score by their prompts, in order of first appearance.

    Rows have one prompt where their tokens and their images are equal.

    Args:
        input_ids: (B, L) prompts padded on the left, completions on the right.
        attention_mask: (B, L), 0 at padding.
        completion_length: T; the last T columns are completions.
        rows: the rows to take. None takes all rows.
        pictures: the images of all rows. None where no row has an image.

    Returns:
        The groups. None where a row with something to score has an empty prompt, so that nothing predicts its first
        token.
    """
    input_ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    prompt_length = input_ids.shape[1] - completion_length
    found: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    numbers = None if pictures is None else pictures.host.numbers.tolist()
    for row in range(len(input_ids)) if rows is None else rows:
        prompt = input_ids[row, :prompt_length][mask[row, :prompt_length]]
        completion = input_ids[row, prompt_length:][mask[row, prompt_length:]]
        if len(completion) == 0:
            continue
        if len(prompt) == 0:
            return None
        found.setdefault((0 if numbers is None else numbers[row], *prompt.tolist()), []).append((row, completion))
    groups = []
    for key, members in found.items():
        indices, completions = zip(*members, strict=True)
        groups.append(Group(torch.tensor(key[1:]), indices, completions))
    if pictures is None:
        return groups
    shown = nn.functional.pad(mask[:, :prompt_length], (0, completion_length))
    return [replace(group, seen=Seen.of(pictures, group.rows[0], shown[group.rows[0]])) for group in groups]


def pack(groups: Sequence[Group]) -> PackedRow:
    """Lay groups end to end in one row."""
    pieces, spans = [], []
    start = 0
    for group in groups:
        pieces += [group.prefix, *group.segments]
        spans.append(_span(start, len(group.prompt) - 1, group.tree))
        start = spans[-1].end
    return PackedRow.of(pieces, tuple(spans))


def places_of(tree: Tree, start: int) -> tuple[list[Range], tuple[tuple[Range, ...], ...]]:
    """Places of the runs laid end to end from a start on, and for each run the places of the runs before it."""
    places = list(pairwise(accumulate((run.end - run.start for run in tree.runs), initial=start)))
    return places, tuple(tuple(places[run] for run in tree.path(index)[:-1]) for index in range(len(places)))


def _span(start: int, shared: int, tree: Tree) -> Span:
    places, before = places_of(tree, start + shared)
    lengths = torch.tensor([tree.runs[leaf].end for leaf in tree.leaves])
    paths = [tree.path(leaf) for leaf in tree.leaves]
    rows = [torch.cat([torch.arange(*places[run]) for run in path]) for path in paths]
    columns = torch.minimum(torch.arange(int(lengths.max())), lengths.unsqueeze(1) - 1)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).gather(1, columns)
    holder = {run: row for row, path in reversed([*enumerate(paths)]) for run in path}
    unpadded = [
        holder[index] * padded.shape[1] + torch.arange(run.start, run.end) for index, run in enumerate(tree.runs)
    ]
    return Span(start, start + shared, tuple(end for _, end in places), before, padded, torch.cat(unpadded))


def passes(lengths: Sequence[int], per_pass: int) -> list[list[int]]:
    """Choose which rows to pad to one length, so that padded tokens plus `per_pass` for each part are fewest.

    Returns:
        Indices into `lengths`, shorter rows in earlier parts.
    """
    rows: dict[int, list[int]] = {}  # rows of equal length are never apart
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        rows.setdefault(lengths[row], []).append(row)
    counts = [0, *accumulate(map(len, rows.values()))]
    best, begins = [0], [0]  # for the n shortest lengths: tokens, and where their last part begins
    for end, longest in enumerate(rows, 1):
        costs = [best[start] + per_pass + (counts[end] - counts[start]) * longest for start in range(end)]
        best.append(min(costs))
        begins.append(costs.index(best[-1]))
    by_length, parts, end = list(rows.values()), [], len(rows)
    while end:
        parts.append([row for same in by_length[begins[end] : end] for row in same])
        end = begins[end]
    return parts[::-1]


def scored(groups: Sequence[Group], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Row and column, (M,) each, of the scored tokens in the padded (B, T) completions, in packed order."""
    rows = [
        torch.full((len(c),), row) for group in groups for row, c in zip(group.rows, group.completions, strict=True)
    ]
    columns = [torch.arange(len(completion)) for group in groups for completion in group.completions]
    return torch.cat(rows).to(device), torch.cat(columns).to(device)


def holders(groups: Sequence[Group]) -> Tensor | None:
    """For each of the `scored` tokens, which label of the packed row holds its value, (M,). None for each its own."""
    index, start = [], 0
    for group in groups:
        places, _ = places_of(group.tree, start)
        index += [torch.arange(*places[run]) for last in group.tree.last for run in group.tree.path(last)]
        start += group.tree.tokens
    return None if sum(map(len, index)) == start else torch.cat(index)


def unpack(values: Tensor, places: tuple[Tensor, Tensor], fill: Tensor) -> Tensor:
    """Put (M,) values of the `scored` tokens into their places in (B, T). Every other place keeps `fill`, (B, T)."""
    return fill.to(values.dtype).index_put(places, values)
