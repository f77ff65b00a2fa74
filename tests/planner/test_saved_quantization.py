"""A folder that was saved quantized is planned as it is loaded, module by module."""

import json
import re

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_plus.planner import Run, load_shape, plan
from grpo_plus.planner.loaded import shape_and_run
from tests.planner.configs import QWEN3_4B
from tests.qlora.models import NF4, lora, save_base
from tests.training import make_trainer

EIGHT = BitsAndBytesConfig(load_in_8bit=True)
WITHOUT_DOWN = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "layers.0.mlp.down_proj", "o_proj"]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def held(model) -> int:
    """Bytes of all weights, with the scales of quantized ones, but without the table of 16 numbers that nf4 stands for."""
    total = 0
    for weight in model.parameters():
        total += weight.numel() * weight.element_size()
        if getattr(weight, "SCB", None) is not None:
            total += weight.SCB.numel() * 4
        if (state := getattr(weight, "quant_state", None)) is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            total += state.state2.absmax.numel() * 4 if state.nested else 0
    return total


@pytest.mark.parametrize("quantization", [NF4, EIGHT, WITHOUT_DOWN], ids=["nf4", "int8", "some left out"])
def test_the_weights_of_a_saved_folder_take_what_the_loaded_model_takes(tmp_path, base, quantization):
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path)
    shape = load_shape(tmp_path)
    assert "Saved in " in shape.notes[-1]
    planned = plan(shape, Run(dtype="bfloat16", lora_r=4))
    assert planned.phases["load"]["weights"] == pytest.approx(held(loaded), rel=0.01)
    assert plan(shape, Run(dtype="bfloat16")).run.lora_r == 16
    assert plan(shape, Run(dtype="bfloat16")).phases["load"]["weights"] == planned.phases["load"]["weights"]


def test_a_4b_model_in_nf4_is_not_planned_in_float32(tmp_path):
    """It was: 69.6 GiB, with all weights training."""
    saved = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    (tmp_path / "config.json").write_text(
        json.dumps(QWEN3_4B | {"quantization_config": saved | {"quant_method": "bitsandbytes"}})
    )
    planned = plan(load_shape(tmp_path), Run(dtype="bfloat16"))
    asked = Run(dtype="bfloat16", lora_r=16, load_in_4bit=True, use_bnb_nested_quant=True)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    assert planned.phases == plan(load_shape(tmp_path), asked).phases


@pytest.mark.parametrize(
    ("method", "message"), [("mxfp4", r"Mxfp4Config\(dequantize=True\)"), ("fp8", "FineGrainedFP8")]
)
def test_a_method_that_training_undoes_is_planned_and_named(tmp_path, method, message):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B | {"quantization_config": {"quant_method": method}}))
    shape = load_shape(tmp_path)
    assert re.search(f"Saved in {method}.*{message}", shape.notes[-1])
    assert plan(shape, Run(dtype="bfloat16")).phases["load"]["weights"] == 2 * shape.parameters


def test_other_methods_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quant_method='gptq', whose memory the planner does not count.*--qlora"):
        load_shape(tmp_path)


@pytest.mark.parametrize("quantization", [NF4, EIGHT], ids=["nf4", "int8"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": ["q_proj"]},
        {"rank_pattern": {"down_proj": 16}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_a_loaded_model_is_planned_with_what_it_holds(tmp_path, base, changes, quantization):
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16)
    model = get_peft_model(loaded, lora(**changes))
    args = make_trainer(tmp_path, optim="adamw_torch").args
    planned = plan(*shape_and_run(model, args))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    size = sum(weight.numel() * weight.element_size() for weight in trained)
    assert planned.phases["update"]["adapters"] == planned.phases["update"]["gradients"] == size
    assert planned.phases["update"]["optimizer state"] == 2 * size
    codes = 16 * 4 * sum(type(weight).__name__ == "Params4bit" for weight in model.parameters())
    nested = 256 * 4 * sum(type(weight).__name__ == "Params4bit" for weight in model.parameters())
    offsets = nested / 256
    extra = codes + nested + offsets if quantization is NF4 else 0
    assert planned.phases["update"]["weights"] == held(model) - size + extra
