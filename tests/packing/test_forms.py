"""Every form gives what plain rows give, values and gradients, on every kind of model; or says that it does not."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer import add_fused_lm_head

from grpo_plus.packing import attention
from grpo_plus.packing.attention import Segments
from grpo_plus.packing.cached import PromptRecord
from grpo_plus.packing.forward import install_packed_forward
from grpo_plus.packing.layout import Group, group_rows, pack, unpack
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import CASCADE, PADDING_FREE, PADDING_FREE_FLASH, SEGMENTS
from tests.close import assert_close
from tests.packing.models import CONFIGS, HYBRIDS, OWN_ATTENTION, tiny
from tests.packing.rows import COMPLETION, gradients, padded_batch, padded_output, rows_alone, rows_padded

# PhiMoE tells its window to the mask alone; test_packer.py sees it take the cache.
SEGMENTED = [name for name in CONFIGS if name not in (*HYBRIDS, *OWN_ATTENTION, "phimoe")]


def in_form(model, form, ids, mask):
    ready = form.ready(form.arrange(group_rows(ids, mask, COMPLETION)), torch.device("cpu"))
    logps, entropies = model(packed=partial(form.run, ready.call, None))
    places, zeros = (ready.rows, ready.columns), torch.zeros(len(ids), COMPLETION)
    return unpack(logps, places, zeros), unpack(entropies, places, zeros)


def assert_exact(model, form, lengths=None):
    ids, mask = padded_batch(lengths)
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
def test_two_passes_through_the_cache_are_exact(monkeypatch, name, checkpointing):
    # Completions together on one of the two, and each length by itself on the other.
    monkeypatch.setattr("grpo_plus.packing.passes.pass_tokens", lambda device: 0 if checkpointing else 1000)
    assert_exact(tiny(name, checkpointing=checkpointing), CACHED)


@pytest.mark.parametrize("name", HYBRIDS)
def test_completions_of_one_token_are_exact(name):
    # A recurrent layer takes a single token for a step of generation.
    assert_exact(tiny(name), CACHED, {23: (1, 1, 0), 14: (1,)})


@pytest.mark.parametrize("pairs", [-1.0, float("inf")], ids=["one-by-one", "together"])
@pytest.mark.parametrize("name", SEGMENTED)
def test_segment_attention_is_exact(monkeypatch, name, pairs):
    monkeypatch.setattr("grpo_plus.packing.rows.pairs_per_call", lambda device: pairs)
    # Checkpointing on one of the two, so that each model meets it.
    assert_exact(tiny(name, checkpointing=pairs < 0), SEGMENTS)


def test_completions_share_a_call_where_padding_is_cheaper():
    # 10 prompt tokens before lengths 4, 3 and 2: three padded queries, each with 10 + 4 keys.
    group = Group(torch.arange(11), (0, 1, 2), tuple(torch.arange(length) for length in (4, 3, 2)))
    (span,) = pack([group]).spans
    assert span.padding_pairs == 3 * 14
    assert Segments((span,), pairs_per_call=14.0).together(span)
    assert not Segments((span,), pairs_per_call=13.9).together(span)


def test_a_recomputed_layer_does_not_write_into_the_record():
    # Its graph would be kept alive until the record goes, and with it what checkpointing saves.
    record = PromptRecord(tiny("llama").config)
    first, again = torch.zeros(1, 2, 3, 8), torch.ones(1, 2, 3, 8)
    record.update(first, first, 0)
    recorded = record.take()
    record.update(again, again, 0)
    assert recorded["attention", 0, 0][0] is first
    assert record.states == {}


@pytest.mark.parametrize("form", [PADDING_FREE, PADDING_FREE_FLASH], ids=lambda form: form.detail)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_padding_free_is_exact(name, form):
    assert_exact(tiny(name), form)


@pytest.mark.parametrize("name", [name for name in SEGMENTED if name != "gemma2"])  # which has a soft cap
def test_cascade_attention_is_exact(name):
    assert_exact(tiny(name, checkpointing=name == "qwen3"), CASCADE)


@pytest.mark.parametrize("form", [CASCADE, SEGMENTS, CACHED, PADDING_FREE], ids=lambda form: form.detail)
def test_a_reentrant_checkpoint_is_exact(form):
    expected_model, model = tiny("llama"), tiny("llama", checkpointing=True, reentrant=True)
    model.enable_input_require_grads()  # a reentrant checkpoint gives gradients where an input has one
    ids, mask = padded_batch()
    expected = gradients(expected_model, lambda: rows_alone(expected_model, ids, mask))
    actual = gradients(model, lambda: in_form(model, form, ids, mask)[0])
    assert_close("gradients", actual[1], expected[1], rtol=2e-6)


@pytest.mark.parametrize("form", [CASCADE, SEGMENTS, CACHED], ids=lambda form: form.detail)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_lora_is_exact(form, checkpointing):
    model = get_peft_model(tiny("qwen3", checkpointing=checkpointing), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.enable_input_require_grads()
    assert_exact(model, form)


@pytest.mark.parametrize("form", [SEGMENTS, CACHED], ids=lambda form: form.detail)
def test_adapters_on_a_4_bit_base_are_exact(tmp_path, form):
    tiny("qwen3", hidden_size=64, head_dim=16, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    assert any("4bit" in type(module).__name__ for module in base.modules())
    add_fused_lm_head(base, temperature=1.3, outputs=("log_probs", "entropy"))
    install_packed_forward(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_exact(model, form)


def test_bfloat16_stays_within_the_noise_of_padding():
    model = tiny("llama").bfloat16()
    ids, mask = padded_batch()
    truth = gradients(tiny("llama"), lambda: rows_alone(model.float(), ids, mask))[0]
    model = model.bfloat16()
    noise = (rows_alone(model, ids, mask) - truth).square().mean().sqrt()
    for form in (CASCADE, SEGMENTS, CACHED):
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
    in_form(model, CASCADE, ids, mask)
    in_form(model, SEGMENTS, ids, mask)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        tokens, tiny("llama").generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    )
