"""Cascade attention gives what each row gives alone; in few launches, and without copies of the prompt."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo_plus.models.layers import UnsupportedLayerError
from grpo_plus.packing import varlen
from grpo_plus.packing.attention import Segments, segment_attention
from grpo_plus.packing.cascade import _merge, cascade_attention, cascade_of, why_not_cascade
from grpo_plus.packing.layout import Group, group_rows, pack
from grpo_plus.packing.prompts_first import pack_prompts_first, prompts_first
from grpo_plus.packing.reference import shared_prompt_attention
from grpo_plus.packing.varlen import Sequences
from tests.close import assert_close
from tests.packing.counting import kept_bytes, launches
from tests.packing.models import tiny
from tests.packing.rows import COMPLETION, forked_batch, padded_batch

HEADS, KEY_HEADS, D, SCALE = 4, 2, 8, 0.3
# Prompt length: lengths of its completions. A prompt of one token shares nothing.
ONE = {23: (17, 0, 9, 1)}
TWO = {23: (17, 0, 9, 1), 14: (2, 5)}
FORKED: dict[int, tuple[int, ...]] = {}  # completions that begin alike
EIGHT = {23: (17, 0, 9, 1), 14: (2, 5), 1: (3, 4), 22: (6,), 9: (1, 1, 1), 2: (4, 7), 17: (0, 8), 12: (3, 3)}


def module(window=None):
    config = SimpleNamespace(layer_types=None, sliding_window=None)
    return SimpleNamespace(config=config, layer_idx=0, num_key_value_groups=HEADS // KEY_HEADS, sliding_window=window)


def states_of(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, heads, D) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def in_cascade(query, key, value, blocks, *, window, sinks):
    batched = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    return cascade_attention(
        module(), *batched, cascade_of(blocks), scaling=SCALE, sliding_window=window, s_aux=sinks
    ).squeeze(0)


def in_reference(query, key, value, blocks, *, window, sinks):
    return shared_prompt_attention(query, key, value, blocks, scale=SCALE, window=window, sinks=sinks)


def each_row_alone(query, key, value, blocks, *, window, sinks):
    """Softmax of each completion over its prompt's and its own keys, token by token."""
    out = torch.zeros_like(query)
    for block in blocks:
        for before, own in zip(block.before, block.runs, strict=True):
            row = [token for place in (block.prompt, *before, own) for token in range(*place)]
            for place, token in enumerate(row):
                seen = row[: place + 1] if window is None else row[max(0, place + 1 - window) : place + 1]
                for head in range(HEADS):
                    scores = SCALE * key[seen, head // 2] @ query[token, head]
                    scores = torch.cat([scores, sinks[head : head + 1]]) if sinks is not None else scores
                    out = out.index_put(
                        (torch.tensor(token), torch.tensor(head)),
                        scores.softmax(0)[: len(seen)] @ value[seen, head // 2],
                    )
    return out


@pytest.mark.usefixtures("everything_is_shared")
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 9, 38, 39])  # 39 is the longest row
@pytest.mark.parametrize("lengths", [ONE, TWO, EIGHT, FORKED], ids=["1 group", "2 groups", "8 groups", "forked"])
def test_outputs_and_gradients_are_those_of_the_specification(lengths, window, sinks):
    blocks, states, learned = packed(lengths, sinks)
    expected = with_gradients(in_reference, states, learned, blocks, window)
    found = with_gradients(in_cascade, states, learned, blocks, window)
    for name, value, truth in zip(("out", "query", "key", "value", "sinks"), found, expected, strict=False):
        assert_close(name, value, truth, rtol=1e-12)


SMALL = {6: (4, 0, 1), 3: (2,), 1: (2, 1), 5: (1, 3)}


@pytest.mark.usefixtures("everything_is_shared")
@pytest.mark.parametrize(
    ("call", "lengths", "window"),
    [
        (in_reference, SMALL, None),
        (in_reference, SMALL, 5),
        (in_cascade, SMALL, None),
        (in_cascade, SMALL, 5),
        (in_reference, FORKED, 15),
    ],
)
def test_each_row_gives_what_it_gives_alone(call, lengths, window):
    blocks, states, learned = packed(lengths, sinks=True)
    expected = with_gradients(each_row_alone, states, learned, blocks, window)
    for value, truth in zip(with_gradients(call, states, learned, blocks, window), expected, strict=True):
        assert_close("states", value, truth, rtol=1e-12)


def packed(lengths, sinks):
    batch = forked_batch() if lengths is FORKED else padded_batch(lengths)
    groups = prompts_first(group_rows(*batch, COMPLETION))
    row = pack_prompts_first(groups)
    learned = torch.linspace(-1, 2, HEADS, dtype=torch.float64).requires_grad_() if sinks else None
    return row.blocks, states_of(row.input_ids.numel()), learned


def with_gradients(call, states, sinks, blocks, window):
    out = call(*states, blocks, window=window, sinks=sinks)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = states if sinks is None else [*states, sinks]
    return [out, *torch.autograd.grad(out, wanted, cotangent)]


def test_cascade_and_segments_agree():
    group = Group(torch.arange(12), (0, 1, 2), tuple(torch.arange(length) for length in (7, 1, 4)))
    row, first = pack([group]), pack_prompts_first([group])  # one group: both lay out the same row
    assert torch.equal(row.input_ids, first.input_ids)
    states = [states.transpose(0, 1).unsqueeze(0) for states in states_of(row.input_ids.numel())]
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    segments = Segments(row.spans, pairs_per_call=float("inf"))
    expected = segment_attention(sdpa_attention_forward, module(), *states, segments, needs_mask=False, scaling=SCALE)
    found = cascade_attention(module(), *states, cascade_of(first.blocks), scaling=SCALE)
    assert_close("out", found, expected, rtol=1e-12)


def test_the_smaller_part_keeps_its_digits_in_half_precision():
    # Own keys outweigh the prompt's by e^12: the prompt's share, 6.1e-6, times outputs of a million is 6.14. A share of
    # 1 - .99999 in bfloat16, or in rounded float32, is 0 or far from it.
    out, other = torch.zeros(1, 1, 4, dtype=torch.bfloat16), torch.full((1, 1, 4), 1e6, dtype=torch.bfloat16)
    lse, other_lse = torch.full((1, 1), 12.0), torch.zeros(1, 1)
    _merge(out, lse, other, other_lse)
    assert out.dtype == torch.bfloat16
    share = torch.tensor(-12.0).double().sigmoid()
    assert_close("the prompt's part", out.double(), (share * other.double()).expand_as(out), rtol=2**-8)
    assert_close("log-sum-exp", lse.double(), torch.tensor([[12.0 + 6.144193e-06]]).double(), rtol=1e-7)


@pytest.mark.parametrize("kwargs", [{"dropout": 0.1}, {"softcap": 50.0}])
def test_dropout_and_soft_caps_are_refused(kwargs):
    blocks, states, _ = packed(ONE, sinks=False)
    batched = [states.transpose(0, 1).unsqueeze(0) for states in states]
    with pytest.raises(ValueError, match="cascade attention has no dropout and no soft cap"):
        cascade_attention(module(), *batched, cascade_of(blocks), **kwargs)


def test_a_window_that_the_layer_does_not_tell_is_refused():
    blocks, states, _ = packed(ONE, sinks=False)
    hidden = module()
    hidden.config.sliding_window = 9
    batched = [states.transpose(0, 1).unsqueeze(0) for states in states]
    with pytest.raises(UnsupportedLayerError, match="does not tell its attention function the sliding window"):
        cascade_attention(hidden, *batched, cascade_of(blocks))


def test_the_reasons_against_cascade_attention_are_named(monkeypatch):
    assert "needs a CUDA device, not cpu" in why_not_cascade(tiny("llama"))
    monkeypatch.setattr("grpo_plus.packing.cascade.why_not_flash", lambda device, dtype: None)
    assert why_not_cascade(tiny("llama")) is None
    assert why_not_cascade(tiny("gpt_oss")) is None
    assert "soft cap" in why_not_cascade(tiny("gemma2"))
    assert "dropout" in why_not_cascade(tiny("llama", attention_dropout=0.1))
    assert "layers of type conv" in why_not_cascade(tiny("lfm2"))
    assert "attention interface" in why_not_cascade(tiny("mpt"))


@pytest.mark.parametrize("window", [None, 7])
def test_torchs_flash_operators_take_our_arguments_and_answer_in_our_shapes(window):
    """By the shapes that torch computes without a device, in the order of its signature."""
    where = Sequences(torch.tensor([0, 4, 9]).int(), torch.tensor([0, 5, 12]).int(), 5, 7, window is not None, window)
    shapes = ((9, HEADS, D), (12, KEY_HEADS, D), (12, KEY_HEADS, D))
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    where = replace(where, queries=where.queries.to("meta"), keys=where.keys.to("meta"))
    out, lse, state = varlen._flash_forward(query, key, value, where, SCALE)
    plain_out, plain_lse = varlen._plain_forward(*(torch.zeros(s) for s in shapes), on_cpu(where), SCALE)
    assert (out.shape, out.dtype) == (plain_out.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (plain_lse.shape, torch.float32)
    gradients = varlen._flash_backward(out, query, key, value, out, lse, where, SCALE, state)
    assert [gradient.shape for gradient in gradients] == [torch.Size(shape) for shape in shapes]
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[3:10] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"]
    names = [argument.name for argument in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    assert names[6:12] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]


def on_cpu(where):
    return replace(where, queries=torch.tensor([0, 4, 9]), keys=torch.tensor([0, 5, 12]))


def test_attention_keeps_the_keys_once_and_no_copies():
    # Qwen3-4B's layer at (512, 256, 8), in bfloat16 on no device: 32 heads, 8 of keys, 128 wide.
    completions = tuple(torch.full((n,), n) for n in range(32, 257, 32))
    row = pack_prompts_first([Group(torch.zeros(512, dtype=torch.long), tuple(range(8)), completions)])
    tokens = row.input_ids.numel()
    assert tokens == 511 + 1152
    shapes = ((1, heads, tokens, 128) for heads in (32, 8, 8))
    query, key, value = (torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes)
    with launches(), kept_bytes() as kept:
        out = cascade_attention(module(), query, key, value, cascade_of(row.blocks))
    for one_each in (query, out):  # any attention keeps its query and its output
        kept.pop(one_each.untyped_storage()._cdata)
    assert sum(kept.values()) <= 10 * 2**20
    # Keys and values of 1,663 tokens, 2 KiB each, and the log-sum-exps of 32 heads in float32.
    assert sum(kept.values()) == tokens * (2 * 2048 + 32 * 4)
