"""Every form gives what plain rows give, values and gradients, on every kind of model; or says that it does not."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_plus.packing import attention
from grpo_plus.packing.forward import CACHED, PADDING_FREE, SEGMENTS
from grpo_plus.packing.layout import group_rows, unpack
from tests.close import assert_close
from tests.packing.models import CONFIGS, HYBRIDS, OWN_ATTENTION, tiny
from tests.packing.rows import COMPLETION, gradients, padded_batch, padded_output, rows_alone, rows_padded

SEGMENTED = [name for name in CONFIGS if name not in HYBRIDS + OWN_ATTENTION]


def in_form(model, form, ids, mask):
    groups = group_rows(ids, mask, COMPLETION, share=form.share)
    logps, entropies = model(packed=partial(form.run, groups, None))
    zeros = torch.zeros(len(ids), COMPLETION)
    return unpack(logps, groups, zeros), unpack(entropies, groups, zeros)


def assert_exact(model, form):
    ids, mask = padded_batch()
    expected = gradients(model, lambda: rows_alone(model, ids, mask))
    padded = gradients(model, lambda: rows_padded(model, ids, mask))
    actual = gradients(model, lambda: in_form(model, form, ids, mask)[0])
    assert expected[1].norm() > 0
    for name, value, truth, noisy in zip(("log-probs", "gradients"), actual, expected, padded, strict=True):
        noise = float((noisy - truth).norm() / truth.norm())
        # Left padding shifts GPT-2's positions: what it changes there is no rounding.
        assert_close(name, value, truth, rtol=max(2e-6, 1.5 * noise if noise < 1e-5 else 0.0))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_passes_through_the_cache_are_exact(name, checkpointing):
    assert_exact(tiny(name, checkpointing=checkpointing), CACHED)


@pytest.mark.parametrize("batched", [False, True], ids=["one-by-one", "together"])
@pytest.mark.parametrize("name", SEGMENTED)
def test_segment_attention_is_exact(monkeypatch, name, batched):
    monkeypatch.setattr("grpo_plus.packing.forward.batches_attention", lambda device: batched)
    # Checkpointing on one of the two, so that each model meets it.
    assert_exact(tiny(name, checkpointing=batched), SEGMENTS)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_padding_free_is_exact(name):
    assert_exact(tiny(name), PADDING_FREE)


@pytest.mark.parametrize("form", [SEGMENTS, CACHED, PADDING_FREE], ids=lambda form: form.detail)
def test_a_reentrant_checkpoint_is_exact(form):
    expected_model, model = tiny("llama"), tiny("llama", checkpointing=True, reentrant=True)
    model.enable_input_require_grads()  # a reentrant checkpoint gives gradients where an input has one
    ids, mask = padded_batch()
    expected = gradients(expected_model, lambda: rows_alone(expected_model, ids, mask))
    actual = gradients(model, lambda: in_form(model, form, ids, mask)[0])
    assert_close("gradients", actual[1], expected[1], rtol=2e-6)


@pytest.mark.parametrize("form", [SEGMENTS, CACHED], ids=lambda form: form.detail)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_lora_is_exact(form, checkpointing):
    model = get_peft_model(tiny("qwen3", checkpointing=checkpointing), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.enable_input_require_grads()
    assert_exact(model, form)


def test_bfloat16_stays_within_the_noise_of_padding():
    model = tiny("llama").bfloat16()
    ids, mask = padded_batch()
    truth = gradients(tiny("llama"), lambda: rows_alone(model.float(), ids, mask))[0]
    model = model.bfloat16()
    noise = (rows_alone(model, ids, mask) - truth).square().mean().sqrt()
    for form in (SEGMENTS, CACHED):
        assert (in_form(model, form, ids, mask)[0] - truth).square().mean().sqrt() < 1.5 * noise


@pytest.mark.parametrize("name", HYBRIDS + OWN_ATTENTION)
def test_segment_attention_is_refused_where_it_would_be_wrong(name):
    assert attention.why_not_segments(tiny(name)) is not None


def test_entropies_are_the_padded_ones():
    model = tiny("llama")
    ids, mask = padded_batch()
    expected = padded_output(model, ids, mask).entropy[:, -COMPLETION:]
    for form in (SEGMENTS, CACHED, PADDING_FREE):
        assert_close("entropies", in_form(model, form, ids, mask)[1], expected, rtol=2e-6)


def test_an_installed_model_still_computes_what_it_did():
    ids, mask = padded_batch()
    expected = tiny("llama")(input_ids=ids, attention_mask=mask).logits
    model = tiny("llama")
    in_form(model, SEGMENTS, ids, mask)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        tokens, tiny("llama").generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    )
