"""Prefix tree of a group: completions of one prompt that begin alike go through the model once as far as they do.

A token's hidden state depends on what stands before the token. Where two completions are equal up to and including a
token, its log-probability is the same in both, and so is all that the layers compute for it. One run of tokens then
serves both completions, and the gradients of both meet in its log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Tokens that a shared run must save. On a CPU a run of its own costs a layer one call of attention: with adapters on a
# small model, 8 saved tokens were worth a call and 16 gained. On a GPU a tree costs a layer six launches.
LEAST_SAVED = 16


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one completion or of several.

    row: index of the first completion that has the run.
    start, end: place in the completion.
    before: index of the run that this one continues. None after the prompt.
    """

    row: int
    start: int
    end: int
    before: int | None = None


@dataclass(frozen=True)
class Tree:
    """Completions of a group as runs.

    runs: each after the run that it continues. Where completions share nothing, one for each in their order.
    last: for each completion, index of the run in which it ends.
    """

    runs: tuple[Run, ...]
    last: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all runs."""
        return sum(run.end - run.start for run in self.runs)

    @property
    def leaves(self) -> list[int]:
        """Indices of the runs that no other continues."""
        inner = {run.before for run in self.runs}
        return [index for index in range(len(self.runs)) if index not in inner]

    def path(self, index: int) -> list[int]:
        """Indices of the runs from the prompt to a run, itself included."""
        before = self.runs[index].before
        return [index] if before is None else [*self.path(before), index]


def prefix_tree(completions: Sequence[Tensor]) -> Tree:
    """Find what is worth sharing.

    Args:
        completions: (c,) token ids each, c >= 1.
    """
    apart = Tree(tuple(Run(row, 0, len(c)) for row, c in enumerate(completions)), tuple(range(len(completions))))
    if len(completions) == 1:
        return apart
    runs: list[Run] = []
    last = [0] * len(completions)
    _grow([completion.tolist() for completion in completions], range(len(last)), runs, last)
    tree = Tree(tuple(runs), tuple(last))
    return tree if tree.tokens < apart.tokens else apart


def _grow(
    texts: Sequence[list[int]],
    rows: Sequence[int],
    runs: list[Run],
    last: list[int],
    *,
    equal: int = 0,
    before: int | None = None,
) -> None:
    """Add the runs of some completions to `runs`, and to `last` where the completions end.

    Args:
        equal: tokens with which all of these completions are known to begin.
        before: index of the run that theirs continue.
    """
    start = 0 if before is None else runs[before].end
    families: dict[tuple[int, ...], list[int]] = {}  # by the next token, which a completion that ends here lacks
    for row in rows:
        families.setdefault(tuple(texts[row][equal : equal + 1]), []).append(row)
    for token, family in families.items():
        end = _equal([texts[row] for row in family])
        if len(family) == 1 or (len(family) - 1) * (end - start) >= LEAST_SAVED:
            index = len(runs)
            runs.append(Run(family[0], start, end, before))
            for row in family:
                last[row] = index
            _grow(texts, [row for row in family if len(texts[row]) > end], runs, last, equal=end, before=index)
        elif token:
            _grow(texts, family, runs, last, equal=end, before=before)
        else:
            for row in family:
                _grow(texts, [row], runs, last, equal=equal, before=before)


def _equal(texts: Sequence[list[int]]) -> int:
    """Number of tokens with which all texts begin."""
    first, final = min(texts), max(texts)  # what these two share, all between them share
    pairs = enumerate(zip(first, final, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(final)))
