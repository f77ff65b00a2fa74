"""Lay out groups so that all shared prompts are one slice of the row, and all completions that look at them another.

shared prompts | rows that share no prompt | completions of the shared prompts, as runs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from grpo_plus.packing.layout import Group, Range, Row, places_of


@dataclass(frozen=True)
class Block:
    """Place of a group in the row.

    start: the first token of its runs. Where no prompt is shared, the prompt is a part of the only run.
    ends: one past the last token of each run.
    before: for each run, the runs between the prompt and it.
    prompt_end: one past the last token of the shared prompt.
    shared: tokens of the shared prompt, 0 where no prompt is shared.
    """

    start: int
    ends: tuple[int, ...]
    before: tuple[tuple[Range, ...], ...]
    prompt_end: int
    shared: int

    @property
    def prompt(self) -> Range:
        """The shared prompt."""
        return self.prompt_end - self.shared, self.prompt_end

    @property
    def runs(self) -> list[Range]:
        """Place of each run."""
        return list(pairwise((self.start, *self.ends)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each run."""
        return [end - start for start, end in self.runs]

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        paths = ((*before, run) for before, run in zip(self.before, self.runs, strict=True))
        return max(sum(end - start for start, end in path) for path in paths)


@dataclass(frozen=True)
class PromptsFirst(Row):
    """A row with its shared prompts first, and the place of each group in the order of the groups."""

    blocks: tuple[Block, ...]


def prompts_first(groups: Sequence[Group]) -> list[Group]:
    """Groups in the order in which `pack_prompts_first` lays out their completions: those that share no prompt first.

    A prompt of one token has nothing to share, since each completion starts with a copy of it.
    """
    parts = [[group] if len(group.prompt) > 1 else group.apart() for group in groups]
    return sorted((group for part in parts for group in part), key=lambda group: len(group.tree.runs) > 1)


def pack_prompts_first(groups: Sequence[Group]) -> PromptsFirst:
    """Lay out groups in one row.

    Args:
        groups: from `prompts_first`.
    """
    alone = [group for group in groups if len(group.tree.runs) == 1]
    sharing = groups[len(alone) :]
    prompt_ends = list(accumulate(len(group.prompt) - 1 for group in sharing))
    start, blocks = prompt_ends[-1] if sharing else 0, []
    for group in alone:
        blocks.append(Block(start, (start + group.tokens,), ((),), 0, 0))
        start += group.tokens
    for group, prompt_end in zip(sharing, prompt_ends, strict=True):
        places, before = places_of(group.tree, start)
        ends = tuple(end for _, end in places)
        blocks.append(Block(start, ends, before, prompt_end, len(group.prompt) - 1))
        start = ends[-1]
    prompts = [group.prefix for group in sharing]
    rest = [piece for group in alone for piece in (group.prefix, *group.segments)]
    rest += [piece for group in sharing for piece in group.segments]
    return PromptsFirst.of([*prompts, *rest], tuple(blocks))
