"""Layers that grow in place hold what transformers' layers hold."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo_plus.rollout import cache
from grpo_plus.rollout.live import Live, Moves
from grpo_plus.rollout.prompts import Prompts

WINDOW = 6
KINDS = {"full": (DynamicLayer, 0), "window": (lambda: DynamicSlidingWindowLayer(WINDOW), WINDOW)}


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 3, generator=generator), torch.randn(rows, 2, tokens, 3, generator=generator)


@pytest.mark.parametrize("prompt", [1, 3, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_grows_in_place_returns_what_transformers_layer_returns(kind, prompt, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 4)
    theirs, ours = KINDS[kind][0](), KINDS[kind][0]()
    for layer in (theirs, ours):
        layer.update(*states(4, prompt, seed=0))
    ours = cache._growing(ours)
    assert isinstance(ours, cache.GrowingLayer)
    rows, places = 4, set()
    for step in range(1, 12):
        if step in (3, 8):  # the first and the last of the rows that are left
            stays = [False, *[True] * (rows - 1)] if step == 3 else [*[True] * (rows - 1), False]
            moves = Moves.of(stays, torch.device("cpu"))
            ours.keep(moves)
            theirs.reorder_cache(moves.order)
            rows = moves.count
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        new = states(rows, 1, seed=step)
        for mine, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        places.add(ours.keys.untyped_storage().data_ptr())
    assert rows == 2
    assert len(places) <= 4  # eleven tokens, and a new buffer for each four
    # A window slides through buffers that are not much longer than itself.
    assert kind == "full" or ours._buffers[0].shape[-2] <= WINDOW + 2 * 4


def test_the_last_rows_take_the_places_that_become_free():
    moves = Moves.of([False, True, False, True, True], torch.device("cpu"))
    assert moves.places == (3, 1, 4)
    assert (moves.source.tolist(), moves.target.tolist()) == ([3, 4], [0, 2])


def test_live_rows_are_found_in_the_batch_and_put_back():
    live = Live(4, torch.device("cpu"))
    assert live.leave([True] * 4) is None
    live.leave([False, True, True, True])
    live.leave([False, True, False, True])
    assert sorted(live.rows) == [1, 3]
    values = torch.arange(4.0)
    assert live.of(values).tolist() == [float(row) for row in live.rows]
    whole = live.whole(torch.tensor([[float(row), 1.0] for row in live.rows]))
    assert whole.tolist() == [[0, 0], [1, 1], [0, 0], [3, 1]]


def test_rows_share_a_prompt_where_tokens_and_padding_are_equal():
    ids = torch.tensor([[5, 6, 7], [0, 6, 7], [5, 6, 7], [0, 6, 7], [4, 6, 7]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]])
    prompts = Prompts.of(ids, mask)
    assert (prompts.first.tolist(), prompts.index.tolist()) == ([0, 1, 3, 4], [0, 1, 0, 2, 3])
    assert prompts.shared
    assert not Prompts.of(ids[3:], None).shared
