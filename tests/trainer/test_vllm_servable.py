"""What vLLM would serve as another policy is refused by name before an engine starts."""

from types import SimpleNamespace

import pytest
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from grpo_plus import GRPOPlusConfig
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.trainer.vllm.servable import check_servable, served_rank
from tests.qlora.models import lora, save_base
from tests.trainer.adapters_to_vllm import load

WHOLE = SimpleNamespace(fsdp_version=None, is_zero3=False)
ONE = ["q_proj"]


def tiny():
    return tiny_model(tiny_tokenizer(), hidden_size=16, num_heads=2, num_layers=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": [*ONE, "o_proj"], "exclude_modules": ["o_proj"], "layers_to_transform": [0]},
    ],
)
def test_plain_adapters_are_served(changes):
    check_servable(get_peft_model(tiny(), lora(**{"target_modules": ONE} | changes)), WHOLE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save=\['lm_head'\].*its own weights for modules that are trained",
        ),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.*its own embeddings"),
        ({"use_dora": True}, "use_dora=True.*no place for DoRA's magnitudes"),
        ({"bias": "all"}, "bias='all'.*no place for an adapter's biases"),
        ({"lora_bias": True}, "lora_bias=True.*no place for an adapter's biases"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.*scales every layer's adapter by one lora_alpha / r"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern=.*scales every layer's adapter by one"),
        (
            {"alora_invocation_tokens": [1]},
            r"alora_invocation_tokens=\[1\] of the LoRA configuration: vLLM does not know",
        ),
        ({"r": 600}, "r=600 is above 512"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' has changed the base, and vLLM loads the base as"),
        ({"target_modules": ["lm_head"]}, "lm_head.lora_A.default.weight is an adapter outside of the language model"),
        (
            {"target_modules": ["embed_tokens"]},
            "embed_tokens.lora_embedding_A.default is trained and is no adapter of a",
        ),
    ],
)
def test_what_vllm_ignores_or_misreads_is_refused(changes, message):
    model = get_peft_model(tiny(), lora(**{"target_modules": ONE} | changes))
    with pytest.raises(ValueError, match=f"vllm_lora_sync=True is not possible: .*{message}.*leave it unset: TRL then"):
        check_servable(model, WHOLE)


def test_a_weight_of_the_base_that_trains_is_refused():
    model = get_peft_model(tiny(), lora())
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="model.norm.weight is trained and is no adapter of a linear layer"):
        check_servable(model, WHOLE)


def test_several_adapters_and_other_kinds_of_them_are_refused():
    model = get_peft_model(tiny(), lora())
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one adapter at a time, and default, other are active"):
        check_servable(model, WHOLE)
    other = get_peft_model(tiny(), IA3Config(task_type="CAUSAL_LM", target_modules=ONE, feedforward_modules=[]))
    with pytest.raises(ValueError, match="vLLM serves LoRA, and the adapter is IA3Config's"):
        check_servable(other, WHOLE)


def test_weights_that_are_spread_by_others_than_fsdp2_are_refused():
    model = get_peft_model(tiny(), lora())
    check_servable(model, SimpleNamespace(fsdp_version=2, is_zero3=False))
    for spread in (SimpleNamespace(fsdp_version=1, is_zero3=False), SimpleNamespace(fsdp_version=None, is_zero3=True)):
        with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 or FSDP1 spreads the adapter"):
            check_servable(model, spread)


def test_a_base_that_vllm_would_quantize_otherwise_is_refused_unless_it_was_saved_so(tmp_path):
    base = save_base(tmp_path / "base", num_layers=1)
    single = get_peft_model(load(base, bits=4, bnb_4bit_use_double_quant=False), LoraConfig(target_modules=ONE))
    with pytest.raises(ValueError, match="'nf4' with bnb_4bit_use_double_quant=False, and vLLM .*set use_vllm=False"):
        check_servable(single, WHOLE)
    single.unload().save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    check_servable(get_peft_model(saved, LoraConfig(target_modules=ONE)), WHOLE)


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (300, 320), (512, 512)])
def test_the_rank_is_rounded_up_to_one_of_vllms(rank, served):
    model = SimpleNamespace(active_adapters=["default"], peft_config={"default": SimpleNamespace(r=rank)})
    assert served_rank(model) == served


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_lora_sync": True}, "vllm_lora_sync=True has no effect without vLLM. Set use_vllm=True, or drop"),
        ({"vllm_lora_sync": 1, "use_vllm": True}, "vllm_lora_sync=1 must be True or False"),
    ],
)
def test_a_configuration_without_vllm_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GRPOPlusConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **fields)
