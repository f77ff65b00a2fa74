"""Where tokens go and come back from: nothing lost, nothing twice, each prompt once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_plus.packing.layout import IGNORED, group_rows, pack, passes, scored, unpack

P, T = 5, 4


@st.composite
def batches(draw):
    """A padded batch whose prompts are drawn from three, with completions of 0 to T tokens."""
    prompts = [torch.arange(1, 1 + draw(st.integers(1, P))) * (10**which) for which in range(3)]
    rows = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, T)), min_size=1, max_size=8))
    ids = torch.zeros(len(rows), P + T, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (which, length) in enumerate(rows):
        used = slice(P - len(prompts[which]), P + length)
        ids[row, used] = torch.cat([prompts[which], 1000 * (row + 1) + torch.arange(length)])
        mask[row, used] = 1
    return ids, mask


def grouped(ids, mask, share):
    groups = group_rows(ids, mask, T)
    return groups if share else [row for group in groups for row in group.apart()]


@given(batches(), st.booleans())
def test_every_scored_token_comes_back_to_its_place(batch, share):
    ids, mask = batch
    groups = grouped(ids, mask, share)
    filled = torch.full((len(ids), T), -1)
    if not groups:
        assert not mask[:, P:].any()
        return
    labels = pack(groups).shift_labels
    restored = unpack(labels[labels != IGNORED], scored(groups), filled)
    assert torch.equal(restored, torch.where(mask[:, P:].bool(), ids[:, P:], filled))


@given(batches())
def test_each_token_is_predicted_from_its_own_row(batch):
    # What a token may see, prompt and own segment up to itself, must spell the row's prefix.
    ids, mask = batch
    for group_row in [group_rows(ids, mask, T)]:
        if not group_row:
            continue
        packed = pack(group_row)
        tokens, positions = packed.input_ids[0], packed.position_ids[0]
        for group, span in zip(group_row, packed.spans, strict=True):
            start = span.prefix
            for row, end in zip(group.rows, span.ends, strict=True):
                seen = torch.cat([tokens[span.start : span.prefix], tokens[start:end]])
                real = ids[row][mask[row].bool()]
                assert torch.equal(seen, real[:-1])
                assert torch.equal(positions[start:end], torch.arange(len(group.prompt) - 1, len(real) - 1))
                start = end


@given(batches())
def test_sharing_costs_a_copy_of_the_last_prompt_token_less_per_row(batch):
    ids, mask = batch
    apart, together = (grouped(ids, mask, share) for share in (False, True))
    saved = sum(group.tokens for group in apart) - sum(group.tokens for group in together)
    assert saved == sum((len(group.rows) - 1) * (len(group.prompt) - 1) for group in together)
    assert pack(together).input_ids.numel() == sum(g.tokens for g in together) if together else True


@given(batches())
def test_padded_rows_of_a_span_hold_its_tokens(batch):
    groups = group_rows(*batch, T)
    if not groups:
        return
    for span in pack(groups).spans:
        flat = span.padded.flatten().index_select(0, span.unpadded)
        assert torch.equal(flat, torch.arange(span.prefix, span.end))
        assert int(span.padded.max()) < span.end


def test_only_the_rows_asked_for_are_packed():
    ids = torch.tensor([[1, 2, 7, 8], [1, 2, 9, 0], [3, 4, 5, 6]])
    groups = group_rows(ids, (ids > 0).long(), 2, rows=[1, 2])
    assert [group.rows for group in groups] == [(1,), (2,)]
    assert scored(groups)[0].tolist() == [1, 2, 2]


def test_a_completion_without_a_prompt_cannot_be_packed():
    ids = torch.tensor([[0, 0, 7, 8]])
    assert group_rows(ids, (ids > 0).long(), 2) is None
    assert group_rows(ids, torch.zeros_like(ids), 2) == []  # with nothing to score, no prompt is missed


def test_rows_share_a_pass_where_padding_costs_less_than_another():
    # Alone: 3 passes and 2 + 5 + 9 tokens. The short ones together: 2 passes and 2 * 5 + 9. All: 1 and 3 * 9.
    lengths = [9, 2, 5]
    assert passes(lengths, 2) == [[1], [2], [0]]  # 22, not 23
    assert passes(lengths, 4) == [[1, 2], [0]]  # 27, not 28
    assert passes(lengths, 9) == [[1, 2, 0]]  # 36, not 37
    assert passes([3], 5) == [[0]]
