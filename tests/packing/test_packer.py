"""The self-check and what follows from it: the best exact form, the next one, or rows as they are; never a wrong number."""

import copy
import gc
import logging
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_plus.models import rounding
from grpo_plus.models.caches import CACHE
from grpo_plus.packing import attention, candidates, cascade, check, layout, passes, varlen
from grpo_plus.packing.head import single_pass_head
from grpo_plus.packing.layout import group_rows
from grpo_plus.packing.packer import Packer
from grpo_plus.packing.padded import PaddedRows, forward_live
from grpo_plus.packing.rows import SEGMENTS
from tests.close import assert_close
from tests.packing.models import HYBRIDS, tiny
from tests.packing.rows import COMPLETION, gradients, padded_batch, padded_output, rows_alone

CHOICES = {
    "llama": "segment attention",
    "gemma3": "segment attention",
    "gpt_oss": "segment attention",
    "gpt2": "segment attention",  # its padded positions differ from these, and that is TRL's padding, not an error
    "qwen3_next": "two passes through the model's cache",
    "qwen3_5": "two passes through the model's cache",
    "lfm2": "two passes through the model's cache",
    "bamba": "two passes through the model's cache",
    "bloom": "two passes through the model's cache",
}


def packed(model, packing="auto", **arguments):
    ids, mask = padded_batch()
    chosen = Packer(packing)
    return chosen, chosen.logps(model, model, PaddedRows(ids, mask, COMPLETION), padded(model), **arguments)


def padded(model):
    def logps(ids, mask, length):
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-length] = -100
        return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -length:]

    return logps


@pytest.mark.parametrize(("name", "detail"), CHOICES.items())
def test_the_best_exact_form_is_chosen(name, detail):
    model = tiny(name)
    chosen, result = packed(model)
    assert detail in chosen.describe()
    assert_close("log-probabilities", result.logps, rows_alone(model, *padded_batch()), rtol=2e-6)


def flash_runs(monkeypatch):
    """Let the flash kernels' emulation stand for a GPU."""
    monkeypatch.setattr("grpo_plus.packing.cascade.why_not_flash", lambda device, dtype: None)


@pytest.mark.parametrize("packing", ["auto", "shared_prompt", "padding_free"])
def test_flash_attention_comes_first_where_it_runs(monkeypatch, packing):
    flash_runs(monkeypatch)
    model = tiny("qwen3")
    chosen, result = packed(model, packing)
    assert chosen.describe() == {"padding_free": "padding_free (flash attention)"}.get(
        packing, "shared_prompt (cascade attention)"
    )
    assert_close("log-probabilities", result.logps, rows_alone(model, *padded_batch()), rtol=2e-6)


def test_flash_kernels_that_get_windows_wrong_are_not_taken_for_windows(monkeypatch):
    # The window is longer than the rows of the self-check, which would see nothing.
    flash_runs(monkeypatch)
    right, models = varlen.forward, [tiny("gemma3"), tiny("llama")]
    models[0].config.sliding_window = 512

    def without_window(query, key, value, where, scale):
        return right(query, key, value, replace(where, window=None), scale)

    assert [cascade.why_not_cascade(model) for model in models] == [None, None]
    monkeypatch.setattr(varlen, "forward", without_window)
    reasons = [cascade.why_not_cascade(model) for model in models]
    assert reasons == ["torch's flash attention gets windows wrong here", None]


def test_right_windows_pass_in_half_precision():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert varlen.why_not_windows(torch.device("cpu"), dtype) is None


def test_segment_attention_follows_where_the_cascade_is_wrong(monkeypatch, caplog):
    flash_runs(monkeypatch)
    monkeypatch.setattr(cascade, "_merge", lambda out, lse, other, other_lse: None)
    model = tiny("qwen3")
    with caplog.at_level(logging.INFO, "grpo_plus"):
        chosen, result = packed(model)
    assert "segment attention" in chosen.describe()
    assert "cascade attention) is not exact on Qwen3ForCausalLM" in caplog.text
    assert_close("log-probabilities", result.logps, rows_alone(model, *padded_batch()), rtol=2e-6)


@pytest.fixture
def kernel():
    """A name under which a kernel computes attention, as `kernels-community/...` does: it reads the config's name."""
    name, sdpa = "kernels-community/test", ALL_ATTENTION_FUNCTIONS["sdpa"]
    names = []

    def attention(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        return sdpa(module, *args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield name, names
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name)


def test_a_kernels_user_gets_the_shared_prompt(monkeypatch, kernel):
    flash_runs(monkeypatch)
    name, names = kernel
    model = tiny("qwen3")
    model.config._attn_implementation = name
    expected = rows_alone(model, *padded_batch())
    chosen = Packer("auto")
    with chosen.while_training():
        result = chosen.logps(model, model, PaddedRows(*padded_batch(), COMPLETION), padded(model))
        assert "cascade attention" in chosen.describe()
        assert_close("log-probabilities", result.logps, expected, rtol=2e-6)
        # Padded rows and generation still go through the kernel, which finds its own name in the config.
        assert model.config._attn_implementation != name
        names.clear()
        assert_close("log-probabilities", rows_alone(model, *padded_batch()), expected, rtol=2e-6)
        assert set(names) == {name}
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_are_not_carried_by_a_transformers_that_gets_them_wrong(monkeypatch, name):
    monkeypatch.setattr(passes.transformers, "__version__", "5.20.3")
    with pytest.warns(UserWarning, match=r"since transformers 5.21, found 5.20.3: pip install -U transformers"):
        assert packed(tiny(name))[1] is None
    assert packed(tiny("bloom"))[1] is not None


def test_without_flash_a_kernels_user_gets_the_cache(kernel):
    model = tiny("qwen3")
    model.config._attn_implementation = kernel[0]
    assert "two passes" in packed(model)[0].describe()


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_padding_free_is_refused_on_a_model_that_carries_state_along_the_row(name):
    with pytest.raises(ValueError, match="packing='padding_free' cannot be exact here"):
        packed(tiny(name), "padding_free")


def test_a_wrong_form_is_caught_and_the_next_one_taken(monkeypatch, caplog):
    right = attention._causal_mask
    monkeypatch.setattr(attention, "_causal_mask", lambda *args: torch.ones_like(right(*args)))
    model = tiny("llama")
    with caplog.at_level(logging.INFO, "grpo_plus"):
        chosen, result = packed(model)
    assert "two passes" in chosen.describe()
    assert "not exact on LlamaForCausalLM" in caplog.text
    assert "log-probabilities differ by" in caplog.text
    assert_close("log-probabilities", result.logps, rows_alone(model, *padded_batch()), rtol=2e-6)


@pytest.mark.parametrize("lengths", [None, {5: (3, 2)}], ids=["long", "short"])
def test_a_wrong_prefix_tree_is_caught_where_the_first_rows_are_short_too(monkeypatch, caplog, lengths):
    monkeypatch.setattr("grpo_plus.packing.rows.pairs_per_call", lambda device: -1.0)
    right = layout.places_of
    monkeypatch.setattr(layout, "places_of", lambda *of: (right(*of)[0], tuple(() for _ in right(*of)[1])))
    ids, mask = padded_batch(lengths)
    model, chosen = tiny("llama"), Packer("auto")
    with caplog.at_level(logging.INFO, "grpo_plus"):
        chosen.logps(model, model, PaddedRows(ids, mask, COMPLETION), padded(model))
    assert "two passes" in chosen.describe()
    assert "segment attention) is not exact" in caplog.text


def forgetful():
    """A model whose backbone takes a cache and position ids, and ignores both."""
    model = tiny("llama")
    forward = model.model.forward

    def forget(input_ids=None, attention_mask=None, position_ids=None, segments=None, **kwargs):
        kwargs.pop(CACHE, None)
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        return forward(input_ids=input_ids, attention_mask=mask, **kwargs)

    model.model.forward = forget
    return model


def test_rows_stay_padded_with_a_warning_where_no_form_is_exact():
    model = forgetful()
    with pytest.warns(UserWarning, match=r"packing: none, rows stay padded.*LlamaForCausalLM.*differ by") as caught:
        chosen, result = packed(model)
    assert result is None
    assert chosen.describe() == "none"
    assert len([w for w in caught if "packing" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = padded_batch()
        assert chosen.logps(model, model, PaddedRows(ids, mask, COMPLETION), padded(model)) is None


def test_a_model_that_the_check_cannot_judge_stays_padded():
    model = tiny("llama")
    model.get_input_embeddings = lambda: torch.nn.Identity()  # nothing passes through it
    with pytest.warns(UserWarning, match="rows stay padded. the self-check failed on plain rows: RuntimeError"):
        assert packed(model)[1] is None


def test_an_explicit_form_that_is_not_exact_is_an_error():
    with pytest.raises(ValueError, match="packing='shared_prompt' cannot be exact here.*LlamaForCausalLM"):
        packed(forgetful(), "shared_prompt")


class CompilerError(Exception):
    """As Triton's, which is no RuntimeError."""


def test_a_head_whose_kernel_does_not_compile_leaves_the_models_head(caplog):
    def broken(model, hidden, targets):
        raise CompilerError("no C compiler")

    model = tiny("llama")
    model.get_output_embeddings().requires_grad_(False)
    packing = Packer("auto", head=broken)
    with caplog.at_level(logging.INFO, "grpo_plus"):
        packing.logps(model, model, PaddedRows(*padded_batch(), COMPLETION), padded(model))
    assert packing.describe() == "shared_prompt (segment attention)"
    assert "CompilerError: no C compiler" in caplog.text


class Casts(TorchDispatchMode):
    """Dtype casts of tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", [True, False])
def test_no_cast_of_the_check_serves_an_update(gradient):
    # Older versions of torch take a cast that was made without a graph: the weight would get no gradient.
    model, groups = tiny("llama"), group_rows(*padded_batch(), COMPLETION)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.autocast("cpu", torch.bfloat16):
        check.choose([SEGMENTS], model, groups, padded(model), [None], gradient=gradient)
        with Casts(weight.shape) as casts:
            torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight)
    assert casts.count == 1


def test_a_rejected_attention_is_taken_back(monkeypatch):
    right = attention._causal_mask
    monkeypatch.setattr(attention, "_causal_mask", lambda *args: torch.ones_like(right(*args)))
    model = tiny("llama")
    packed(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_wrong_gradient_is_caught(monkeypatch):
    # Right log-probabilities, but nothing flows back through the prompt's keys.
    monkeypatch.setattr(
        "grpo_plus.packing.cached.PromptRecord.update",
        lambda self, keys, values, layer_idx, *_: (
            self.states.setdefault(("attention", layer_idx, 0), (keys.detach(), values.detach())),
            (keys, values),
        )[1],
    )
    monkeypatch.setattr(candidates, "why_not_segments", lambda model: "not in this test")
    with pytest.raises(ValueError, match="cannot be exact here"):
        packed(tiny("llama"), "shared_prompt")


HEAD = single_pass_head("torch", temperature=1.3)


@pytest.mark.parametrize(
    ("name", "single_pass"), [("gemma2", True), ("cohere", True), ("llama", True), ("granite", False)]
)
def test_a_frozen_head_takes_a_single_pass_where_that_is_exact(name, single_pass):
    # Granite divides its logits by a field that the single pass does not read: the check sends it to the model's own.
    model = tiny(name)
    model.get_output_embeddings().requires_grad_(False)
    ids, mask = padded_batch()
    chosen = Packer("auto", head=HEAD)
    result = chosen.logps(model, model, PaddedRows(ids, mask, COMPLETION), padded(model))
    assert chosen.describe().endswith("single-pass head") == single_pass
    assert_close("log-probabilities", result.logps, rows_alone(model, ids, mask), rtol=2e-6)


def test_a_head_that_trains_stays_the_models_own():
    model = tiny("llama")
    chosen = Packer("auto", head=HEAD)
    chosen.logps(model, model, PaddedRows(*padded_batch(), COMPLETION), padded(model))
    assert not chosen.describe().endswith("head")


def test_a_small_constant_error_is_caught(caplog):
    # Its gradient is right, so only the values tell.
    def off(model, hidden, targets):
        logps, entropies = HEAD(model, hidden, targets)
        return logps + 1e-4, entropies

    model = tiny("llama")
    model.get_output_embeddings().requires_grad_(False)
    chosen = Packer("auto", head=off)
    with caplog.at_level(logging.INFO, "grpo_plus"):
        chosen.logps(model, model, PaddedRows(*padded_batch(), COMPLETION), padded(model))
    assert not chosen.describe().endswith("head")
    assert "log-probabilities differ by 1.0e-04" in caplog.text


def test_products_that_are_rounded_widen_what_passes(monkeypatch):
    product = torch.mm

    def in_tf32(left, right, **kwargs):  # 10 bits of mantissa
        return product(*((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (left, right)), **kwargs)

    assert not rounding.rounds_products(torch.device("cpu"))
    chosen = {}
    for rounded in (False, True):
        for error in (5e-4, 2e-2):
            with monkeypatch.context() as patch:
                if rounded:
                    patch.setattr(torch, "mm", in_tf32)
                model = tiny("llama")
                model.get_output_embeddings().requires_grad_(False)

                def off(model, hidden, targets, error=error):
                    logps, entropies = HEAD(model, hidden, targets)
                    return logps + error, entropies

                packing = Packer("auto", head=off)
                packing.logps(model, model, PaddedRows(*padded_batch(), COMPLETION), padded(model))
                chosen[rounded, error] = packing.describe().endswith("single-pass head")
    assert chosen == {(False, 5e-4): False, (False, 2e-2): False, (True, 5e-4): True, (True, 2e-2): False}


def test_the_gradient_is_checked_where_only_fresh_adapters_train(monkeypatch):
    # The gradient of lora_A is 0 as long as lora_B is, in every form, a wrong one too.
    def detached(self, keys, values, layer_idx, *_):
        self.states.setdefault(("attention", layer_idx, 0), (keys.detach(), values.detach()))
        return keys, values

    monkeypatch.setattr("grpo_plus.packing.cached.PromptRecord.update", detached)
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear")).get_base_model()
    chosen = Packer("shared_prompt", no_segments="not in this test")
    with pytest.raises(ValueError, match="cannot be exact here"):
        chosen.logps(model, model, PaddedRows(*padded_batch(), COMPLETION), padded(model))


def test_a_window_that_only_the_mask_knows_is_not_packed():
    # PhiMoE's attention function is not told the window; probes shorter than it could not tell.
    model = tiny("phimoe", sliding_window=150)
    chosen, _ = packed(model)
    assert "two passes" in chosen.describe()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_whose_position_frequencies_depend_on_their_length_stay_padded(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=64)
    with pytest.warns(UserWarning, match="longer than the model's original positions stay padded"):
        _, result = packed(model)  # 40 tokens
    assert result is None
    assert packed(tiny("llama", rope_parameters=rope | {"original_max_position_embeddings": 40}))[1] is not None


def test_an_explicit_single_pass_that_is_not_exact_warns():
    model = tiny("granite")
    model.get_output_embeddings().requires_grad_(False)
    chosen = Packer("auto", head=HEAD, insist_on_head=True)
    with pytest.warns(UserWarning, match="logprob_backend: the model's fused head. with the single-pass head"):
        chosen.logps(model, model, PaddedRows(*padded_batch(), COMPLETION), padded(model))


def test_a_row_without_anything_to_score_has_no_entropy():
    ids, mask = padded_batch()
    mask[0, -COMPLETION:] = 0
    rows = PaddedRows(ids, mask, COMPLETION, live=(0,))
    nothing = torch.full((1, COMPLETION), torch.nan)  # what padding holds is nobody's business
    assert forward_live(rows, lambda ids, mask: (torch.zeros(1, COMPLETION), nothing)).entropies[1:].eq(0).all()


def test_a_copy_of_an_installed_model_computes_with_its_own_weights():
    model = tiny("llama")
    packed(model)
    twin = copy.deepcopy(model)
    twin.get_input_embeddings().weight.data.zero_()
    ids, mask = padded_batch()
    result = Packer("auto").logps(twin, twin, PaddedRows(ids, mask, COMPLETION), padded(twin))
    assert_close("log-probabilities", result.logps, rows_alone(twin, ids, mask), rtol=2e-6)
    assert not torch.allclose(result.logps, packed(model)[1].logps)


def test_the_check_leaves_no_model_behind():
    # Checkpoints that no backward has walked hold their layers, in a circle that Python's collector does not see.
    model = tiny("qwen3_5", checkpointing=True)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    chosen, result = packed(model)
    assert "two passes" in chosen.describe()
    result.logps.sum().backward()
    del model, chosen, result
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


def test_dropout_is_not_shared():
    chosen, _ = packed(tiny("llama", attention_dropout=0.1).eval())
    assert "padding_free" in chosen.describe()
    with pytest.raises(ValueError, match="attention_dropout 0.1: a shared prompt would draw one dropout mask"):
        packed(tiny("llama", attention_dropout=0.1), "shared_prompt")
    with_module = tiny("gpt2", resid_pdrop=0.2)
    assert "padding_free" in packed(with_module)[0].describe()
    assert with_module.training
    assert [name for name, module in with_module.named_modules() if not module.training] == []


def test_the_line_counts_the_tokens_of_the_form_that_was_chosen(caplog):
    with caplog.at_level(logging.INFO, "grpo_plus"):
        _, result = packed(tiny("llama", attention_dropout=0.1))
    assert f"packing: padding_free (segment attention), {9 * 40 / result.tokens:.1f}x fewer tokens" in caplog.text


def test_a_model_of_an_earlier_trainer_is_installed_once():
    model = tiny("llama")
    packed(model)
    installed = model.forward
    packed(model)
    assert model.forward.__func__ is installed.__func__


def test_rows_in_chunks_give_what_they_give_together():
    model = tiny("llama")
    together = packed(model)[1]
    chunked = packed(model, max_tokens=40)[1]
    assert_close("log-probabilities", chunked.logps, together.logps, rtol=2e-6)
    assert chunked.tokens == together.tokens


def test_skipped_rows_keep_what_they_are_filled_with():
    model = tiny("llama")
    ids, mask = padded_batch()
    chosen = Packer("auto")
    fill = -torch.rand(len(ids), COMPLETION)
    live = tuple(row for row in range(len(ids)) if row % 2 == 0)
    result = chosen.logps(model, model, PaddedRows(ids, mask, COMPLETION, live, fill), padded(model))
    expected = fill.clone()
    inside = mask[:, -COMPLETION:].bool()
    expected[::2] = torch.where(inside[::2], rows_alone(model, ids[::2], mask[::2]), fill[::2])
    assert_close("log-probabilities", result.logps, expected, rtol=2e-6)
    entropy = padded_output(model, ids, mask).entropy[:, -COMPLETION:]
    mean = entropy[::2][inside[::2]].mean()
    assert_close("entropy of forwarded rows", result.entropies[::2], entropy[::2], rtol=2e-6)
    assert_close("entropy of skipped rows", result.entropies[1::2], mean * inside[1::2], rtol=2e-6)


def test_tokens_are_those_that_went_through_the_model():
    # Prompts of 23 (completions 17, 0, 1, 9), 14 (5, 2), 1 (3, 4) and 22 (6) tokens; a prompt's last counts per row.
    assert packed(tiny("llama"))[1].tokens == 22 + 27 + 13 + 7 + 0 + 7 + 21 + 6
    assert packed(tiny("llama"), "padding_free")[1].tokens == 22 * 3 + 27 + 13 * 2 + 7 + 7 + 21 + 6


@pytest.mark.parametrize("exact", [True, False], ids=["in parts", "whole"])
def test_a_prompt_longer_than_a_pass_goes_through_the_cache_where_that_is_exact(monkeypatch, caplog, exact):
    def detached(self, keys, values, layer_idx, *_):
        self.states["attention", layer_idx, self.part] = keys.detach(), values.detach()
        return keys, values

    if not exact:
        monkeypatch.setattr("grpo_plus.packing.cached.PromptRecord.update", detached)
    cut, parts = passes._in_parts, []
    monkeypatch.setattr(passes, "_in_parts", lambda *inputs: parts.append(len(cut(*inputs))) or cut(*inputs))
    model = tiny("llama")
    expected = gradients(model, lambda: rows_alone(model, *padded_batch()))
    with caplog.at_level(logging.INFO, logger="grpo_plus"):
        actual = gradients(model, lambda: packed(model, "shared_prompt", bound=10)[1].logps)
    assert_close("gradients", actual[1], expected[1], rtol=2e-6)
    # Prompts of 22, 13, 0 and 21 tokens before their last one, in passes of 10. The one of 0 fits.
    assert sorted(parts) == ([2, 3, 3] if exact else [])
    place = "go through the model's cache in parts." if exact else "stay whole. "
    assert f"packing: prompts longer than a pass {place}" in caplog.text
