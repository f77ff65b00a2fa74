"""Turns of completions are found by what they have read, whatever TRL leaves out of them."""

import math

import torch

from grpo_plus.kernels.linear_logprob.kept import KeptRows
from grpo_plus.rollout.recorder import Recorder
from grpo_plus.trainer.rollouts.written import Generation, Piece, Written

# Four rows of one prompt. Two equal calls are answered by 7 and by 8, and a third by an answer that fills the completion.
PROMPTS = [[1, 2]] * 4
FIRST = Generation(PROMPTS, [[5], [5], [5, 5], [6]])
SECOND = Generation([[1, 2, 5, 7], [1, 2, 5, 8], [1, 2, 5, 5, 9, 9]], [[3], [3, 4], [4]])
COMPLETIONS = [[5, 7, 3], [5, 8, 3], [5, 5, 9, 9], [6]]  # the end of one turn is cut, and all of another
MASKS = [[1, 0, 1], [1, 0, 1], [1, 1, 0, 0], [1]]


class Sized(Recorder):
    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        return self._size


def test_each_turn_is_found_where_it_stands():
    written = Written.of([FIRST, SECOND], PROMPTS, COMPLETIONS, MASKS)
    assert written.pieces == [
        [Piece(0, 0, 1, 0), Piece(1, 0, 1, 1), Piece(2, 0, 2, 2), Piece(3, 0, 1, 3)],
        [Piece(0, 2, 1, 0), Piece(1, 2, 1, 1)],
    ]
    assert not written.in_one_piece
    # Of two equal turns, the first is left out. The second has read something else.
    cut = Written.of([FIRST, SECOND], PROMPTS, [[5, 7], *COMPLETIONS[1:]], [[1, 0], *MASKS[1:]])
    assert cut.pieces[1] == [Piece(1, 2, 1, 1)]
    plain = Written.of([FIRST], PROMPTS, [list(ids) for ids in FIRST.completion_ids], None)
    assert plain.in_one_piece


def test_completions_that_others_have_made_are_not_known():
    assert Written.of([], PROMPTS, COMPLETIONS, MASKS) is None
    assert Written.of([FIRST], PROMPTS, COMPLETIONS, MASKS) is None
    assert Written.of([FIRST, SECOND], PROMPTS, [[5, 7, 4], *COMPLETIONS[1:]], MASKS) is None


def test_records_go_where_their_tokens_stand():
    written = Written.of([FIRST, SECOND], PROMPTS, COMPLETIONS, MASKS)
    first = torch.tensor([[-1.0, 0.0], [-2.0, 0.0], [-3.0, -4.0], [-5.0, 0.0]])
    second = torch.tensor([[-6.0, 0.0], [-7.0, -8.0], [-9.0, 0.0]])
    nan = math.nan
    expected = [[-1, nan, -6, nan], [-2, nan, -7, nan], [-3, -4, nan, nan], [-5, nan, nan, nan]]
    torch.testing.assert_close(written.placed_logps([first, second]), torch.tensor(expected), equal_nan=True)

    lists = KeptRows(
        torch.tensor([[1, 0], [-2, 0], [1, 1], [1, 0]]), torch.tensor([[10, 0], [11, 12], [13, 14], [15, 0]])
    )
    later = KeptRows(torch.tensor([[2, 0], [1, 1], [1, 0]]), torch.tensor([[20, 21], [22, 23], [24, 0]]))
    placed = written.placed_kept([lists, later])
    assert placed.counts.tolist() == [[1, 0, 2, 0], [-2, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    used = placed.counts.abs().sum(1).tolist()
    found = [row[:count] for row, count in zip(placed.ids.tolist(), used, strict=True)]
    assert found == [[10, 20, 21], [11, 12, 22], [13, 14], [15]]


def test_recorders_are_dealt_to_the_generations_in_order():
    written = Written.of([FIRST, SECOND], PROMPTS, COMPLETIONS, MASKS)
    sizes = written.tables([Sized(3), Sized(1), Sized(3)], lambda parts: [(each.size, rows) for each, rows in parts])
    assert sizes == [[(3, [[5], [5], [5, 5]]), (1, [[6]])], [(3, [[3], [3, 4], [4]])]]
    assert written.tables([Sized(3), Sized(1), Sized(2)], len) is None
    assert written.tables([Sized(3)], len) is None
