"""What LoRA layers keep during a hold: the same numbers as PEFT's, never an old weight, and less for the host."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_callback import TrainerCallback

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.qlora import plain_lora
from grpo_plus.qlora.lora_layers import fused_lora
from tests.close import assert_close
from tests.launches import Launches, launches_per_layer
from tests.qlora.models import load_nf4, lora
from tests.training import make_trainer, weights_of

BF16 = torch.bfloat16
IDS = torch.arange(3, 27).view(2, 12) % 15


@pytest.fixture(scope="module")
def make(base):
    """A tiny model with float32 adapters that do something, its base in float32, bfloat16 or nf4."""

    def make(kind: str = "float32", **config):
        torch.manual_seed(1)
        if kind == "nf4":
            model = load_nf4(base)
        else:
            model = tiny_model(tiny_tokenizer(), hidden_size=64, num_heads=2).to(getattr(torch, kind))
        model = get_peft_model(model, lora(**({"lora_alpha": 12} | config)))
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
            if "lora_B" in name:
                weight.data.normal_(std=0.1)
        return model.train()

    return make


def gradients(model, autocast=False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", BF16) if autocast else nullcontext():
        logits = model(input_ids=IDS, use_cache=False).logits.float()
    (logits.log_softmax(-1) * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach()} | found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def learned(model, products) -> None:
    """Let the layers that share an input be seen."""
    with products.held():
        logits(model)


def assert_same(actual, expected, rtol):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert_close(name, actual[name], value, rtol=rtol)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("ranks", [{}, {"rank_pattern": {"k_proj": 3, "up_proj": 1}}], ids=["one rank", "three ranks"])
def test_gradients_of_siblings_are_pefts(make, checkpointing, ranks):
    model = make(**ranks)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    expected = gradients(model)
    with fused_lora(model) as products:
        for _ in range(3):  # alone, then with its siblings, then from copies that are filled again
            with products.held():
                assert_same(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "float32"])
def test_under_autocast_it_is_as_far_from_float32_as_pefts(make, kind):
    model = make(kind)
    pefts = gradients(model, autocast=True)
    twin = model if kind == "nf4" else copy.deepcopy(model).float()
    truth = gradients(twin)
    with fused_lora(model) as products:
        learned(model, products)
        with products.held():
            ours = gradients(model, autocast=True)
            torch.clear_autocast_cache()
            assert_same(gradients(model, autocast=True), ours, 1e-9)
    for side in ("logits", "lora_A", "lora_B"):
        errors = []
        for run in (ours, pefts):
            pairs = [(run[name].double(), truth[name].double()) for name in truth if side in name]
            errors.append(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))
        assert errors[0] <= 2 * errors[1], (side, errors)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", ["in place", "data", "another tensor", "another parameter", "state dict"])
def test_a_weight_that_changes_between_holds_is_seen(make, autocast, change):
    model = make()
    other = make(init_lora_weights=False)
    values = {name: weight.detach() for name, weight in other.named_parameters() if "lora_" in name}
    with fused_lora(model) as products:
        for _ in range(2):
            with products.held():
                before = gradients(model, autocast)
        for name, value in values.items():
            module, _, _ = name.rpartition(".")
            weight = model.get_parameter(name)
            if change == "in place":
                with torch.no_grad():
                    weight.copy_(value)
            elif change == "data":
                weight.data.copy_(value)
            elif change == "another tensor":
                weight.data = value.clone()
            elif change == "another parameter":
                model.get_submodule(module).weight = nn.Parameter(value.clone())
        if change == "state dict":
            model.load_state_dict(values, strict=False)
        with products.held():
            after = gradients(model, autocast)
    with fused_lora(other) as products:
        for _ in range(2):
            with products.held():
                expected = gradients(other, autocast)
    assert_same(after, expected, 1e-6)
    assert not torch.allclose(before["logits"], after["logits"], rtol=1e-2)


def test_outside_of_a_hold_a_weight_may_change_at_any_time(make):
    model, other = make(), make(init_lora_weights=False)
    with fused_lora(model) as products:
        learned(model, products)
        learned(model, products)
        for name, weight in model.named_parameters():
            weight.data.copy_(other.get_parameter(name).data)
        assert_same(gradients(model), gradients(other), 1e-5)


def test_adapters_switched_off_or_to_another_within_a_hold(make):
    model = make()
    model.add_adapter("other", lora(r=2, init_lora_weights=False))
    first = gradients(model)
    model.set_adapter("other")
    second = gradients(model)
    model.set_adapter("default")
    with model.disable_adapter():
        off = logits(model)
    with fused_lora(model) as products:
        learned(model, products)
        with products.held():
            assert_same(gradients(model), first, 1e-5)
            with model.disable_adapter():
                assert torch.equal(logits(model), off)
            model.set_adapter("other")
            assert_same(gradients(model), second, 2e-4)
        with products.held():
            assert_same(gradients(model), second, 2e-4)
            model.set_adapter("default")
            assert_same(gradients(model), first, 1e-5)
            model.merge_adapter()
            torch.testing.assert_close(logits(model), first["logits"], rtol=1e-4, atol=1e-5)
            model.unmerge_adapter()


def test_a_hook_that_comes_between_holds_is_called(make):
    model, calls = make(), []
    with fused_lora(model) as products:
        learned(model, products)
        layer = next(module for name, module in model.named_modules() if name.endswith("k_proj"))
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
        expected = gradients(model)
        calls.clear()
        with products.held():
            assert_same(gradients(model), expected, 1e-5)
    assert calls


class Block(nn.Module):
    """Three layers on one input, not all of which every call needs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, size) for size in (4, 6, 4))

    def forward(self, x, use=(True, True, True), between=lambda x: x):
        outputs = []
        for layer, used in zip((self.one, self.two, self.three), use, strict=True):
            if used:
                outputs.append(layer(x))
                x = between(x)
        return torch.cat(outputs, -1)


def block():
    torch.manual_seed(0)
    model = get_peft_model(Block(), LoraConfig(r=2, target_modules=["one", "two", "three"], init_lora_weights=False))
    return model, torch.randn(5, 8)


def block_gradients(model, x, **call):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model((x * 1.0), **call)
    output.square().sum().backward()
    return {"output": output.detach(), "x": x.grad} | {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


CALLS = {
    "the second is left out": {"use": (True, False, True)},
    "the first is left out": {"use": (False, True, True)},
    "every layer has an input of its own": {"between": lambda x: x + 1},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_siblings_that_are_none_in_another_call(call):
    model, x = block()
    expected = block_gradients(model, x), block_gradients(model, x, **call)
    with fused_lora(model) as products:
        for _ in range(3):
            with products.held():
                assert_same(block_gradients(model, x), expected[0], 1e-5)
                assert_same(block_gradients(model, x, **call), expected[1], 1e-5)


def test_an_input_that_changes_in_place_is_another_input():
    model, x = block()
    call = {"between": lambda x: x.mul_(1.5)}
    with torch.no_grad(), fused_lora(model) as products:
        model(x)
        expected = model(x.clone(), **call)
        for _ in range(3):
            with products.held():
                model(x)
                torch.testing.assert_close(model(x.clone(), **call), expected)


def test_an_output_that_nobody_uses_leaves_its_adapter_without_a_gradient():
    model, x = block()
    with fused_lora(model) as products:
        for _ in range(2):
            with products.held():
                model.zero_grad()
                model(x)[:, :4].sum().backward()
                model.zero_grad()
                module = model.base_model.model
                used, _, _ = module.one(x), module.two(x), module.three(x)
                used.sum().backward()
                assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {
                    f"base_model.model.one.lora_{side}.default.weight" for side in "AB"
                }


def test_outputs_may_be_changed_in_place():
    model, x = block()
    module = model.base_model.model

    def run():
        model.zero_grad()
        outputs = [module.one(x), module.two(x), module.three(x)]
        sum(output.mul_(2).square().sum() for output in outputs).backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected = run()
    with fused_lora(model) as products:
        for _ in range(2):
            with products.held():
                assert_same(run(), expected, 1e-5)


def test_what_inference_mode_has_copied_can_be_trained_with(make):
    model = make("bfloat16")
    with fused_lora(model) as products:
        for _ in range(2):
            with products.held(), torch.inference_mode(), torch.autocast("cpu", BF16):
                model(input_ids=IDS)
        with products.held():
            gradients(model, autocast=True)


def test_a_graph_that_outlives_its_hold_is_an_error_and_not_another_gradient():
    model, x = block()
    with fused_lora(model) as products:
        for _ in range(2):
            with products.held():
                loss = model(x).sum()
        with products.held(), torch.no_grad():
            model(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_is_kept_after_the_training(make):
    model = make("bfloat16")
    with fused_lora(model) as products:
        for _ in range(2):
            with products.held(), torch.autocast("cpu", BF16):
                logits(model)
        copies = [copies for siblings in products._kept.values() for copies, _, _ in siblings._copies.values()]
        assert len(copies) == 8  # q k v, o, gate up, down in two layers
        kept = [weakref.ref(tensor) for a, all_b in copies for tensor in (a, *all_b)]
        del copies
    assert [reference() for reference in kept if reference() is not None] == []


def test_the_question_what_fits_is_asked_once_in_a_training(make, monkeypatch):
    model, asked = make(), []
    unfit = plain_lora.unfit
    with fused_lora(model) as products:
        monkeypatch.setattr(plain_lora, "unfit", lambda layer: asked.append(layer) or unfit(layer))
        for _ in range(3):
            with products.held():
                gradients(model)
    assert not asked


CHANGES = {
    "a hook of the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "a hook of B": lambda layer: layer.lora_B["default"].register_full_backward_hook(lambda *_: None),
    "a forward of A": lambda layer: setattr(layer.lora_A["default"], "forward", lambda x: x),
    "a forward of the layer": lambda layer: setattr(layer, "forward", lambda x: x),
    "a dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "a base that trains": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "another base": lambda layer: setattr(layer, "base_layer", nn.Linear(64, 64)),
    "another weight": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(64, 64), False)),
    "another A": lambda layer: setattr(layer.lora_A["default"], "weight", nn.Parameter(torch.ones(4, 64))),
    "a bias of B": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(64))),
    "another scaling": lambda layer: layer.set_scale("default", 2),
    "another adapter": lambda layer: layer.set_adapter([]),
    "a variant": lambda layer: layer.lora_variant.update(default=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_layer_is_noticed_by_the_quick_look(make, change):
    layer = next(module for name, module in make().named_modules() if name.endswith("q_proj"))
    judged = plain_lora.Judged(layer)
    assert judged.part is not None
    assert judged.holds()
    change(layer)
    assert not judged.holds()


@pytest.mark.parametrize(("grad", "pefts", "ours"), [(True, 276, 184), (False, 110, 65)], ids=["update", "decoding"])
def test_launches_per_decoder_layer(grad, pefts, ours):
    """bf16 autocast, float32 adapters on all linear layers, TRL's padded rows; decoding: one token per row."""

    def count(layers: int, held: bool) -> int:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen3Config(vocab_size=31, num_hidden_layers=layers, head_dim=8, **sizes)
        model = get_peft_model(Qwen3ForCausalLM(config).to(BF16), LoraConfig(r=4, target_modules="all-linear")).train()
        ids = IDS if grad else IDS[:, :1]
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[1], [12]])).long()

        def run():
            model.zero_grad()
            with torch.set_grad_enabled(grad), torch.autocast("cpu", BF16):
                output = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            if grad:
                output.sum().backward()

        with fused_lora(model) if held else nullcontext() as products:
            for _ in range(2):
                with products.held() if held else nullcontext():
                    run()
            with products.held() if held else nullcontext(), Launches() as launches:
                run()
        return launches.counts.total()

    assert launches_per_layer(lambda layers: count(layers, held=False)) == pefts
    assert launches_per_layer(lambda layers: count(layers, held=True)) <= ours


class Meddler(TrainerCallback):
    """Changes the adapters after a step, as `sync_ref_model` and callbacks of users do, behind autograd's back."""

    def on_step_end(self, args, state, control, model, **_):
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.mul_(1.3).add_(0.01)


@pytest.mark.parametrize("config", [{}, {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}])
def test_a_training_holds_in_all_of_its_forwards_and_trains_what_peft_trains(tmp_path, config):
    trained = {}
    for backend in ("peft", "torch"):
        torch.manual_seed(5)
        model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
        trainer = make_trainer(
            tmp_path / backend,
            trainer_class=GRPOPlusTrainer,
            config_class=GRPOPlusConfig,
            model=model,
            trainer_arguments={
                "peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
                "eval_dataset": make_trainer.__kwdefaults__["train_dataset"].select(range(4)),
            },
            lora_backend=backend,
            generation_kwargs={"do_sample": False},
            num_iterations=2,
            beta=0.1,
            gradient_accumulation_steps=2,
            skip_old_policy_pass=False,
            optim="sgd",
            learning_rate=0.1,
            max_steps=4,
            **config,
        )
        held = set()
        trainer.model.get_base_model().model.layers[0].register_forward_hook(
            lambda *_, trainer=trainer, held=held: held.add((torch.is_grad_enabled(), trainer.speed.adapters.is_held))
        )
        trainer.add_callback(Meddler())
        trainer.train()
        if backend == "torch":
            assert held == {(False, True), (True, True)}
        assert not trainer.speed.adapters.is_held
        trained[backend] = weights_of(trainer)
    for name, weight in trained["peft"].items():
        assert_close(name, trained["torch"][name], weight, rtol=1e-4)
