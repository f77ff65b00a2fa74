"""PEFT's LoRA layers with another forward: what they compute, what they save for backward, and what they stay."""

import copy
import io
import itertools
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.qlora.lora_layers import fits_any, fused_lora, unfit, why_not_fused
from tests.close import assert_close
from tests.qlora.models import load_nf4, lora

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def make(base):
    """A tiny model with adapters that do something, its base in float32, bfloat16 or nf4."""

    def make(kind: str, adapter_dtype: torch.dtype = torch.float32, **config):
        torch.manual_seed(1)
        if kind == "nf4":
            model = load_nf4(base)
        else:
            model = tiny_model(tiny_tokenizer(), hidden_size=64, num_heads=2).to(getattr(torch, kind))
        model = get_peft_model(model, lora(lora_alpha=12, **config))
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(adapter_dtype)
            if "lora_B" in name:
                weight.data.normal_(std=0.1)
        return model.train()

    return make


IDS = torch.arange(3, 27).view(2, 12) % 15


def gradients(model, autocast=None) -> dict[str, torch.Tensor]:
    """The logits, and the gradients of an arbitrary function of them: of all A in one vector, and of all B."""
    model.zero_grad()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        logits = model(input_ids=IDS, use_cache=False).logits.float()
    (logits.log_softmax(-1) * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    sides = {side: [grad.flatten() for name, grad in grads.items() if side in name] for side in ("lora_A", "lora_B")}
    return {"logits": logits.detach()} | {side: torch.cat(parts) for side, parts in sides.items()}


def fused(model, autocast=None) -> dict[str, torch.Tensor]:
    with fused_lora(model):
        return gradients(model, autocast)


def assert_same(actual, expected, rtol):
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert_close(name, actual[name], value, rtol=rtol)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_in_float32_everything_is_pefts(make, checkpointing, config):
    model = make("float32", **config)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert why_not_fused(model) == []
    assert_same(fused(model), gradients(model), 2e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize(("adapter_dtype", "autocast"), [(torch.float32, BF16), (torch.float32, None), (BF16, None)])
def test_it_is_as_far_from_the_truth_as_peft_is(make, kind, adapter_dtype, autocast):
    model = make(kind, adapter_dtype)
    ours, pefts = fused(model, autocast), gradients(model, autocast)
    truth = gradients(exact(model))
    for name, value in pefts.items():
        errors = [float((run[name].double() - truth[name]).norm() / truth[name].norm()) for run in (ours, pefts)]
        assert ours[name].dtype == value.dtype
        assert errors[0] <= 1.5 * errors[1], f"{name}: {errors}"


def exact(model):
    """The same weights, dequantized, in float64."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        base = getattr(layer, "base_layer", None)
        if type(base).__name__ == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            dense = nn.Linear(base.in_features, base.out_features, bias=False)
            dense.weight = nn.Parameter(dequantize_4bit(base.weight.data, base.weight.quant_state), requires_grad=False)
            layer.base_layer = dense
    return twin.double()


@pytest.mark.parametrize(
    ("kind", "autocast", "less"),
    [("nf4", None, 0.8), ("nf4", BF16, 1.0), ("float32", None, 1.0), ("float32", BF16, 1.0)],
)
def test_less_is_kept_for_backward(make, kind, autocast, less):
    model = make(kind)
    with fused_lora(model):
        ours = saved_bytes(model, autocast)
    assert ours <= less * saved_bytes(model, autocast)


def test_float32_inputs_are_kept_as_autocast_has_rounded_them(make):
    layer = next(module for module in make("nf4").modules() if hasattr(module, "lora_A"))
    rows = torch.randn(32, layer.in_features, requires_grad=True)
    with fused_lora(layer):
        ours = saved_bytes(layer, BF16, rows)
    assert ours <= 2 * rows.numel() + 2 * 32 * 4  # two bytes per input, and (N, r = 4)


def saved_bytes(model, autocast, *inputs) -> int:
    """Of the tensors that autograd keeps, each storage once, without the model's own."""
    named = {} if inputs else {"input_ids": IDS, "use_cache": False}
    own = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", BF16, enabled=autocast is not None):
        model(*inputs, **named)
    return sum(storage.nbytes() for storage in kept.values())


def test_no_layer_makes_a_second_output(make, monkeypatch):
    # PEFT's 4-bit layer clones its output; here nothing of the output's size comes after the base's product.
    layer = next(module for module in make("nf4").modules() if hasattr(module, "lora_A"))
    copies = []
    original = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda *args, **kw: copies.append(1) or original(*args, **kw))
    with fused_lora(layer):
        layer(torch.randn(3, layer.in_features, dtype=BF16))
    assert not copies
    layer(torch.randn(3, layer.in_features, dtype=BF16))
    assert copies


def test_with_the_adapters_off_it_is_the_base(make):
    model = make("nf4")
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=IDS).logits
        with fused_lora(model):
            actual = model(input_ids=IDS).logits
    assert torch.equal(actual, expected)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, expected)


def test_merged_adapters_are_not_added_twice(make):
    model = make("float32")
    with torch.no_grad(), fused_lora(model):
        expected = model(input_ids=IDS).logits
        model.merge_adapter()
        merged = model(input_ids=IDS).logits
        model.unmerge_adapter()
        unmerged = model(input_ids=IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unmerged, expected, rtol=1e-4, atol=1e-5)


def test_another_active_adapter_is_the_one_that_counts(make):
    model = make("float32")
    model.add_adapter("other", lora(r=2))
    first = gradients(model)
    model.set_adapter("other")
    expected = gradients(model)
    with fused_lora(model):
        assert_same(gradients(model), expected, 2e-6)
        model.base_model.set_adapter(["default", "other"])  # PEFT's own forward takes both
        both = gradients(model)
        model.set_adapter("default")
        assert_same(gradients(model), first, 2e-6)
    model.base_model.set_adapter(["default", "other"])
    assert_same(both, gradients(model), 1e-9)


def test_the_model_stays_what_it_was(make):
    model = make("float32")
    names, forwards = list(model.state_dict()), [module.forward for module in model.modules()]
    with fused_lora(model):
        assert list(model.state_dict()) == names
        twin = copy.deepcopy(model)
        assert [module.forward for module in model.modules()] != forwards
    assert [module.forward for module in model.modules()] == forwards
    expected = gradients(model)
    for weight in model.parameters():  # a copy made inside computes with its own weights
        weight.data.zero_()
    assert_same(gradients(twin), expected, 2e-6)


def test_a_training_inside_another_leaves_the_outer_ones_layers(make):
    model = make("float32")
    with fused_lora(model):
        forwards = [module.forward for module in model.modules()]
        with fused_lora(model):
            pass
        assert [module.forward for module in model.modules()] == forwards
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


def test_a_model_saved_whole_inside_can_be_loaded(make):
    model, file = make("float32"), io.BytesIO()
    with fused_lora(model):
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(gradients(loaded), gradients(model), 2e-6)


def test_a_layer_whose_forward_someone_else_has_replaced_keeps_theirs(make):
    model, calls = make("float32"), []
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    own = layer.forward
    layer.forward = theirs = lambda x: calls.append(1) or own(x)
    assert why_not_fused(model) == ["their forward has been replaced by another"]
    with fused_lora(model):
        gradients(model)
        assert len(calls) == 1
    assert vars(layer)["forward"] is theirs


def test_it_leaves_when_the_training_fails(make):
    model = make("float32")
    with pytest.raises(RuntimeError, match="stop"), fused_lora(model):
        raise RuntimeError("stop")
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


REASONS = [
    ({"use_dora": True}, "DoraLinearVariant is no plain LoRA"),
    ({"lora_dropout": 0.1}, "lora_dropout is 0.1"),
    ({"lora_bias": True}, r"the adapters have biases"),
    ({"bias": "all"}, "weights or biases of the base train"),
    ({"target_modules": ["embed_tokens"]}, "Embedding over Embedding is no linear layer that is known here"),
]


@pytest.mark.parametrize(("config", "reason"), REASONS, ids=str)
def test_what_is_more_than_plain_lora_stays_pefts_and_says_why(config, reason):
    model = nn.ModuleDict({"proj": nn.Linear(8, 8), "embed_tokens": nn.Embedding(9, 8)})
    model = get_peft_model(model, LoraConfig(**({"target_modules": ["proj"]} | config)))
    (found,) = why_not_fused(model)
    assert reason in found
    assert not fits_any(model)
    with fused_lora(model):
        assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


class Packed(torch.Tensor):
    """Stands for what torchao or a tensor-parallel plan puts in the place of a plain weight."""


def test_a_weight_that_is_no_plain_tensor_stays_pefts():
    model = get_peft_model(nn.ModuleDict({"proj": nn.Linear(8, 8)}), LoraConfig(target_modules=["proj"]))
    base = model.base_model.model["proj"].base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Packed), requires_grad=False)
    assert why_not_fused(model) == ["the weight of the base is a Packed"]


def test_a_step_of_generation_is_pefts(make):
    layer = next(module for module in make("bfloat16", BF16).modules() if hasattr(module, "lora_A"))
    x = torch.randn(50, 1, layer.in_features, dtype=BF16)
    with torch.no_grad():
        expected = layer(x)
        with fused_lora(layer):
            assert torch.equal(layer(x), expected)
            assert not torch.equal(layer(x.transpose(0, 1))[0], expected[:, 0])  # a row of tokens is rounded less often


def test_where_fp16_and_bf16_meet_it_is_pefts_and_says_why(make):
    layer = next(module for module in make("nf4").modules() if hasattr(module, "lora_A"))
    x = torch.randn(3, layer.in_features, dtype=BF16)
    with torch.autocast("cpu", torch.float16):
        expected = layer(x)
        with fused_lora(layer), pytest.warns(UserWarning, match=r"in torch\.float16, its input in torch\.bfloat16"):
            actual = layer(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_a_hook_is_called_as_under_peft(make):
    model = make("float32")
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    calls = []
    with fused_lora(model):
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
        assert unfit(layer) == "parts of it are offloaded or have hooks"
        gradients(model)
    assert calls


def test_what_is_no_lora_has_nothing_to_fuse():
    assert why_not_fused(nn.Linear(2, 2)) == ["the model has no adapters"]
    assert not fits_any(nn.Linear(2, 2))
