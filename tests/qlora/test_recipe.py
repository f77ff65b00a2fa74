"""The recipe as Hugging Face's objects, as flags of TRL's, and both in a run."""

import dataclasses

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_tokenizer
from grpo_plus.qlora import qlora
from grpo_plus.qlora.recipe import qlora_flags
from tests.training import PROMPTS, vowels

MODEL_FLAGS = {field.name for field in dataclasses.fields(ModelConfig)}


def test_the_recipe_is_made_of_hugging_face_objects():
    recipe = qlora(r=8)
    assert isinstance(recipe.quantization_config, BitsAndBytesConfig)
    assert isinstance(recipe.peft_config, LoraConfig)
    quantization = recipe.quantization_config
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert (quantization.bnb_4bit_use_double_quant, quantization.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    lora = recipe.peft_config
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (8, 16, 0.0, "all-linear")
    assert recipe.config["model_init_kwargs"] == {"dtype": "bfloat16"}
    assert (recipe.config["optim"], recipe.config["gradient_checkpointing"]) == ("adamw_8bit", True)


def test_every_argument_reaches_the_object_it_belongs_to():
    recipe = qlora(r=4, alpha=5, target_modules=["q_proj"], double_quant=False, optim="sgd")
    lora = recipe.peft_config
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (4, 5, {"q_proj"})
    assert recipe.quantization_config.bnb_4bit_use_double_quant is False
    assert recipe.config["optim"] == "sgd"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_flags_of_the_command_line_give_the_same_objects(dtype):
    recipe, flags = qlora(dtype=dtype), qlora_flags() | {"dtype": dtype}
    model = ModelConfig(**{name: value for name, value in flags.items() if name in MODEL_FLAGS})
    assert get_quantization_config(model).to_dict() == recipe.quantization_config.to_dict()
    from_flags, ours = (config.to_dict() for config in (get_peft_config(model), recipe.peft_config))
    assert from_flags == ours
    config = {name: value for name, value in flags.items() if name not in MODEL_FLAGS}
    without_dtypes = {
        name: value for name, value in recipe.config.items() if name not in ("model_init_kwargs", "bf16", "fp16")
    }
    assert config == without_dtypes
    assert model.dtype == recipe.config["model_init_kwargs"]["dtype"]


def test_cards_before_ampere_compute_in_float16_with_adapters_in_float32():
    recipe = qlora(dtype="float16")
    assert recipe.quantization_config.bnb_4bit_compute_dtype == torch.float16
    assert (recipe.config["fp16"], recipe.config["bf16"]) == (True, False)
    assert recipe.config["adapter_dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"r": 0}, "r=0 is no rank"), ({"dtype": "float32"}, "dtype='float32' is not one that 4-bit weights")],
)
def test_a_wrong_value_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        qlora(**arguments)


def test_without_bitsandbytes_the_recipe_says_what_to_install(monkeypatch):
    monkeypatch.setattr("grpo_plus.qlora.checks.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"qlora\(\) needs bitsandbytes.*pip install bitsandbytes peft"):
        qlora()


def test_the_recipe_trains_from_the_name_of_a_model(tmp_path, base):
    recipe = qlora(r=4)
    trainer = GRPOPlusTrainer(
        model=str(base),
        reward_funcs=vowels,
        args=GRPOPlusConfig(
            str(tmp_path),
            **recipe.config | {"learning_rate": 1e-3},
            use_cpu=True,
            max_steps=2,
            max_completion_length=8,
            num_generations=4,
            per_device_train_batch_size=8,
            report_to="none",
        ),
        train_dataset=PROMPTS,
        processing_class=tiny_tokenizer(),
        quantization_config=recipe.quantization_config,
        peft_config=recipe.peft_config,
    )
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    trainer.train()
    assert trainer.model.is_loaded_in_4bit
    for name, weight in trainer.model.named_parameters():
        if name in start:
            assert weight.dtype == torch.float32
            assert not torch.equal(weight, start[name]), name
    kept = {weight.dtype for name, weight in trainer.model.named_parameters() if name not in start}
    assert kept == {torch.bfloat16, torch.uint8}
