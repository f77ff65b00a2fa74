"""Passes of bounded size: the gradients of one pass, while the backward holds a part of the rows at a time."""

import gc
import weakref

import pytest
import torch

from grpo_plus.kernels.linear_logprob import single_pass
from grpo_plus.models.offload import Offload
from grpo_plus.packing import passes, recomputed
from grpo_plus.packing.choice import Choice
from grpo_plus.packing.forward import Form
from grpo_plus.packing.head import single_pass_head
from grpo_plus.packing.layout import unpack
from grpo_plus.packing.padded import Layout, forward_padded
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import CASCADE, PADDING_FREE, SEGMENTS
from tests.close import assert_close
from tests.packing.counting import kept_bytes
from tests.packing.models import tiny
from tests.packing.rows import COMPLETION, gradients, padded_batch

CPU = torch.device("cpu")
# The group of 22 + 27 tokens goes through the model in several passes, and the small groups share a pass.
BOUND = 40


def logps_of(model, form: Form, bound: int | None, batch=None, head=None):
    ids, mask = padded_batch() if batch is None else batch
    parts = Layout.read(ids, mask, COMPLETION, None).ready(form, CPU, None, bound)
    logps, _ = Choice(form, head).run(model, parts)
    places = torch.cat([part.rows for part in parts]), torch.cat([part.columns for part in parts])
    return unpack(logps, places, torch.zeros(ids.shape[0], COMPLETION))


def padded_logps(model, rows_at_once: int, batch=None):
    def forward(base, ids, mask):
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-COMPLETION] = -100
        output = base(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        return output.log_probs[:, -COMPLETION:], output.entropy[:, -COMPLETION:]

    ids, mask = padded_batch() if batch is None else batch
    return forward_padded(model, model, ids, mask, forward, rows_at_once * ids.shape[1])[0]


CHECKPOINTS = {
    "plain": {},
    "checkpoints": {"checkpointing": True},
    "reentrant": {"checkpointing": True, "reentrant": True},
}


@pytest.mark.parametrize("settings", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("form", [SEGMENTS, CASCADE, CACHED, PADDING_FREE], ids=str)
def test_passes_of_bounded_size_give_the_gradients_of_one(form, settings):
    model = tiny("qwen3", **settings)
    model.enable_input_require_grads()  # a reentrant checkpoint asks for it, as PEFT does
    expected = gradients(model, lambda: logps_of(model, form, None))
    actual = gradients(model, lambda: logps_of(model, form, BOUND))
    assert_close("log-probabilities", actual[0], expected[0], rtol=1e-6)
    assert_close("gradients", actual[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize("settings", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_padded_rows_in_parts_give_the_gradients_of_all_at_once(settings):
    model = tiny("qwen3", **settings)
    model.enable_input_require_grads()
    expected = gradients(model, lambda: padded_logps(model, 100))
    actual = gradients(model, lambda: padded_logps(model, 3))
    assert_close("gradients", actual[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_a_recurrent_state_goes_on_into_every_pass(name):
    model = tiny(name)
    expected, actual = (gradients(model, lambda bound=bound: logps_of(model, CACHED, bound)) for bound in (None, 20))
    assert_close("gradients", actual[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", [SEGMENTS, CACHED], ids=str)
def test_what_the_backward_keeps_grows_with_the_pass_and_not_with_the_rows(form, checkpointing):
    model = tiny("qwen3", checkpointing=checkpointing)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def kept(rows: int, bound: int | None) -> int:
        with kept_bytes() as found:
            logps_of(model, form, bound, padded_batch({3: (17,) * rows}))
        return sum(size for address, size in found.items() if address not in weights)

    one = kept(2, None)
    assert kept(16, None) > 5 * one
    assert kept(16, 36) < 1.3 * one


def test_a_pass_draws_the_same_dropout_again(monkeypatch):
    model = tiny("qwen3", attention_dropout=0.3)

    def seeded():
        torch.manual_seed(5)
        return padded_logps(model, 2)

    actual = gradients(model, seeded)
    monkeypatch.setattr(recomputed, "checkpoint", lambda function, *inputs, **_: function(*inputs))
    expected = gradients(model, seeded)
    assert_close("gradients", actual[1], expected[1], rtol=1e-6)


def test_gradients_of_passes_are_summed_in_the_dtype_of_the_weights():
    model = tiny("qwen3")
    ids, mask = padded_batch()

    def under_autocast(rows):
        with torch.autocast("cpu", torch.bfloat16):
            return padded_logps(model, 3, (ids[rows], mask[rows]))

    _, together = gradients(model, lambda: under_autocast(slice(None)))
    apart = [gradients(model, lambda rows=rows: under_autocast(rows))[1] for rows in map(slice, (0, 3, 6), (3, 6, 9))]
    assert_close("gradients", together, sum(apart), rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", [SEGMENTS, CACHED], ids=str)
def test_passes_go_with_layer_inputs_on_the_host(form, reentrant):
    model = tiny("qwen3", checkpointing=True, reentrant=reentrant)
    model.enable_input_require_grads()
    expected = gradients(model, lambda: logps_of(model, form, None))
    with Offload(least_bytes=0).of(model):
        actual = gradients(model, lambda: logps_of(model, form, BOUND))
    assert_close("gradients", actual[1], expected[1], rtol=1e-6)


def test_a_single_pass_head_forms_its_derivatives_once(monkeypatch):
    model = tiny("qwen3")
    model.get_output_embeddings().requires_grad_(False)
    head = single_pass_head("torch", temperature=1.3)
    expected = gradients(model, lambda: logps_of(model, SEGMENTS, None, head=head))
    formed, whole = [], single_pass._times_weight
    monkeypatch.setattr(single_pass, "_times_weight", lambda *inputs: formed.append(1) or whole(*inputs))
    logps = logps_of(model, SEGMENTS, BOUND, head=head)
    assert len(formed) == 1  # the last pass, which the backward does not compute again
    logps.sum().backward()
    assert len(formed) == len(Layout.read(*padded_batch(), COMPLETION, None).ready(SEGMENTS, CPU, None, BOUND)) > 2
    actual = gradients(model, lambda: logps_of(model, SEGMENTS, BOUND, head=head))
    assert_close("gradients", actual[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3", {}),
        ("gemma3", {}),
        ("mistral", CHECKPOINTS["checkpoints"]),
        ("qwen3", CHECKPOINTS["reentrant"]),
        ("qwen3_5", CHECKPOINTS["checkpoints"]),
        ("lfm2", {}),
    ],
)
def test_a_prompt_in_parts_gives_the_gradients_of_the_whole_prompt(name, settings):
    model = tiny(name, **settings)
    model.enable_input_require_grads()
    expected = gradients(model, lambda: logps_of(model, CACHED, None))
    actual = gradients(model, lambda: logps_of(model, CACHED, 8))  # three parts of a prompt of 22 tokens
    assert_close("log-probabilities", actual[0], expected[0], rtol=1e-6)
    assert_close("gradients", actual[1], expected[1], rtol=1e-6)


def test_every_part_of_a_prompt_has_two_tokens():
    def sizes(length, bound):
        ids = torch.arange(length)[None]
        return [part.input_ids.shape[1] for part in passes._in_parts(passes._Prompts(ids, ids, None), bound)]

    assert sizes(22, 8) == [8, 7, 7]
    assert sizes(22, 22) == [22]
    assert sizes(5, 1) == [3, 2]
    assert sizes(1, 1) == [1]


def test_of_a_long_prompt_the_backward_keeps_its_records_and_one_part():
    model = tiny("qwen3")
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def kept(bound: int | None) -> int:
        with kept_bytes() as found:
            logps_of(model, CACHED, bound, padded_batch({23: (2,)}))
        return sum(size for address, size in found.items() if address not in weights)

    # 22 tokens of the prompt, of two layers two heads with keys and values of 8 numbers.
    records = 22 * 2 * 2 * 2 * 8 * 4
    assert kept(8) < 0.4 * kept(None)
    assert kept(8) - kept(2) < records


@pytest.mark.parametrize("bound", [None, 8], ids=["whole", "in parts"])
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_a_prompt_outlives_its_update(bound, backward, monkeypatch):
    # Of a sliding window's first keys, no backward walks the graph.
    model = tiny("mistral", checkpointing=True)
    keys = []
    take = passes.PromptRecord.take

    def watched(record):
        states = take(record)
        keys.extend(weakref.ref(state) for pair in states.values() for state in pair)
        return states

    monkeypatch.setattr(passes.PromptRecord, "take", watched)
    logps = logps_of(model, CACHED, bound)
    if backward:
        logps.sum().backward()
    del logps
    gc.collect()
    assert keys
    assert not any(key() is not None for key in keys)
