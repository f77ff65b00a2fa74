"""Log-probabilities over what a sampler could draw: every form of rows against rows alone and all of their logits."""

import pytest
import torch
from torch import Tensor

from grpo_plus.kernels.linear_logprob import listed
from grpo_plus.kernels.linear_logprob.kept import KeptRows
from grpo_plus.packing import PaddedRows, Truncated, score_padded, why_not_truncated
from grpo_plus.packing.choice import Choice
from grpo_plus.packing.layout import unpack
from grpo_plus.packing.padded import Layout
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import CASCADE, PADDING_FREE, SEGMENTS
from tests.close import assert_close
from tests.packing.models import VOCABULARY, tiny
from tests.packing.rows import COMPLETION, PROMPT, forked_batch, gradients, padded_batch, rows_padded

TEMPERATURE = 1.3  # of the tiny models


def kept_rows(ids: Tensor, mask: Tensor, *, lists: bool = False) -> tuple[KeptRows, Tensor]:
    """Random kept sets that hold the tokens of the completions, and (B, T, V) bool what is left out.

    Sets are of all sizes, with `lists` of up to half of the vocabulary.
    """
    generator = torch.Generator().manual_seed(5)
    completions, seen = ids[:, PROMPT:], mask[:, PROMPT:].bool()
    odds = torch.rand(*seen.shape, 1, generator=generator) * (0.3 if lists else 1.0)
    could = torch.rand(*seen.shape, VOCABULARY, generator=generator) < odds
    could.scatter_(2, completions.unsqueeze(-1), True).masked_fill_(~seen.unsqueeze(-1), True)
    sizes = could.sum(-1)
    are_kept = 2 * sizes <= VOCABULARY
    listed = could == are_kept.unsqueeze(-1)
    lists = [row.nonzero()[:, 1] for row in listed]
    table = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
    return KeptRows(torch.where(are_kept, sizes, sizes - VOCABULARY), table), ~could


def rows_alone(model, ids: Tensor, mask: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities and entropies out of all logits of each row without padding; 0 at padding."""
    scores = torch.zeros(2, len(ids), COMPLETION)
    for row, seen in enumerate(mask.bool()):
        count = int(seen[PROMPT:].sum())
        if count == 0:
            continue
        logits = model(input_ids=ids[row][seen].unsqueeze(0)).logits[0, -count - 1 : -1].float() / TEMPERATURE
        logps = logits.masked_fill(left_out[row, :count], -torch.inf).log_softmax(-1)
        picked = logps.gather(1, ids[row, PROMPT : PROMPT + count, None])[:, 0]
        entropies = torch.special.entr(logps.detach().exp()).sum(-1)
        scores = scores.index_put(
            (torch.tensor([[0], [1]]), torch.tensor(row), torch.arange(count)), torch.stack([picked, entropies])
        )
    return scores[0], scores[1]


def scored(model, form, bound, ids: Tensor, mask: Tensor, truncated: Truncated) -> tuple[Tensor, Tensor]:
    if form is None:
        packed = score_padded(model, model, PaddedRows(ids, mask, COMPLETION, truncated=truncated), 4)
        return packed.logps, packed.entropies
    parts = Layout.read(ids, mask, COMPLETION, None).ready(form, ids.device, None, bound)
    zeros = torch.zeros(len(ids), COMPLETION)
    places = torch.cat([part.rows for part in parts]), torch.cat([part.columns for part in parts])
    logps, entropies = Choice(form, None).run(model, parts, truncated)
    return unpack(logps, places, zeros), unpack(entropies, places, zeros)


@pytest.mark.parametrize(
    ("name", "form", "frozen", "lists", "bound"),
    [
        ("llama", CASCADE, False, False, None),
        ("llama", SEGMENTS, True, False, 30),
        ("llama", CACHED, False, True, 30),
        ("llama", PADDING_FREE, False, False, 30),
        ("llama", None, True, True, None),
        ("gemma2", SEGMENTS, False, True, None),  # a soft cap, and a head that is tied to the embeddings
        ("qwen3_next", CACHED, True, False, None),
        ("gemma2", None, False, False, None),
    ],
    ids=str,
)
def test_every_form_gives_what_rows_alone_give(monkeypatch, name, form, frozen, lists, bound):
    monkeypatch.setattr(listed, "PER_ENTRY", {"cpu": 0})  # however long the lists are
    model = tiny(name)
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    ids, mask = padded_batch()
    kept, left_out = kept_rows(ids, mask, lists=lists)
    truncated = Truncated(kept, lists, TEMPERATURE)
    expected = gradients(model, lambda: rows_alone(model, ids, mask, left_out)[0])
    actual = gradients(model, lambda: scored(model, form, bound, ids, mask, truncated)[0])
    plain = rows_padded(model, ids, mask)
    assert (actual[0] - plain)[mask[:, PROMPT:].bool()].mean() > 0.1  # what is left out is gained
    for what, value, truth in zip(("log-probs", "gradients"), actual, expected, strict=True):
        assert_close(what, value, truth, rtol=1e-5)
    with torch.no_grad():
        entropies = scored(model, form, bound, ids, mask, truncated)[1]
        assert_close("entropies", entropies, rows_alone(model, ids, mask, left_out)[1], rtol=1e-5)


def test_rows_that_share_a_run_keep_tokens_of_their_own(everything_is_shared):
    model, (ids, mask) = tiny("llama"), forked_batch()
    kept, left_out = kept_rows(ids, mask)
    expected = gradients(model, lambda: rows_alone(model, ids, mask, left_out)[0])
    truncated = Truncated(kept, False, TEMPERATURE)
    actual = gradients(model, lambda: scored(model, SEGMENTS, None, ids, mask, truncated)[0])
    for what, value, truth in zip(("log-probs", "gradients"), actual, expected, strict=True):
        assert_close(what, value, truth, rtol=1e-5)


@pytest.mark.parametrize(("name", "known"), [("llama", True), ("gemma2", True), ("granite", False)])
def test_a_head_of_another_kind_is_found(name, known):
    model = tiny(name)
    ids, mask = padded_batch()
    rows = PaddedRows(ids, mask, COMPLETION, truncated=Truncated(kept_rows(ids, mask)[0], False, TEMPERATURE))
    rows.attention_mask[:, PROMPT:] = 0  # as where completions are cut off and masked
    reason = why_not_truncated(model, rows, lambda ids, mask, _: rows_padded(model, ids, mask))
    assert (reason is None) == known
    assert known or "log-probabilities differ by" in reason


def test_skipped_rows_keep_what_fills_them():
    model = tiny("llama")
    ids, mask = padded_batch()
    truncated, fill = Truncated(kept_rows(ids, mask)[0], False, TEMPERATURE), torch.full((len(ids), COMPLETION), -0.5)
    live = (1, 4, 5)
    with torch.no_grad():
        every = score_padded(model, model, PaddedRows(ids, mask, COMPLETION, truncated=truncated))
        some = score_padded(model, model, PaddedRows(ids, mask, COMPLETION, live, fill, truncated=truncated), 2)
    seen = mask[:, PROMPT:].bool()
    for row in range(len(ids)):
        expected = torch.where(seen[row], every.logps[row], fill[row]) if row in live else fill[row]
        assert_close(f"row {row}", some.logps[row], expected, rtol=1e-6)
    assert some.tokens == 3 * ids.shape[1]
