"""What a trainer with a quantized base refuses, before it loads anything."""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.qlora.checks import check_adapter_folder
from tests.close import differing
from tests.qlora.models import NF4, load_nf4, lora, make_qlora_trainer, save_base
from tests.training import PROMPTS, make_trainer, vowels


def construct(tmp_path, model, **arguments):
    config = {"use_cpu": True, "bf16": False, "report_to": "none"} | arguments.pop("config", {})
    return GRPOPlusTrainer(
        model=model,
        reward_funcs=vowels,
        args=GRPOPlusConfig(str(tmp_path), **config),
        train_dataset=PROMPTS,
        processing_class=tiny_tokenizer(),
        **arguments,
    )


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "grpo_plus.qlora.checks.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )


@pytest.mark.parametrize("given", ["argument", "model_init_kwargs"])
def test_a_missing_bitsandbytes_is_an_import_error_with_the_install_line(tmp_path, no_bitsandbytes, given):
    arguments = {"quantization_config": NF4} if given == "argument" else {}
    config = {} if arguments else {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    with pytest.raises(ImportError, match="quantization_config needs bitsandbytes.*pip install bitsandbytes peft"):
        construct(tmp_path, "nowhere/to-be-found", config=config, **arguments)


def test_four_and_eight_bits_together_are_refused_by_transformers():
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit are both True"):
        BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)


def test_four_and_eight_bits_together_are_refused_in_model_init_kwargs(tmp_path):
    both = {"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}
    with pytest.raises(ValueError, match="load_in_4bit=True and load_in_8bit=True.*Drop load_in_8bit"):
        construct(tmp_path, "nowhere/to-be-found", config={"model_init_kwargs": both})


@pytest.fixture
def saved_quantized(tmp_path, base):
    load_nf4(base).save_pretrained(tmp_path / "nf4")
    return str(tmp_path / "nf4")


@pytest.mark.parametrize("given", ["argument", "model_init_kwargs"])
def test_a_second_quantization_config_for_a_folder_saved_in_nf4_is_refused(tmp_path, saved_quantized, given):
    """transformers would keep the folder's settings, whatever is asked for."""
    arguments = {"quantization_config": NF4} if given == "argument" else {}
    config = {} if arguments else {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    with pytest.raises(
        ValueError, match="nf4' was saved quantized .quant_method='bitsandbytes'.*Drop quantization_con"
    ):
        construct(tmp_path, saved_quantized, config=config, peft_config=lora(), **arguments)


def test_a_folder_saved_in_nf4_trains_by_itself_but_not_with_vllm(tmp_path, saved_quantized):
    trainer = construct(tmp_path, saved_quantized, config={"bf16": True}, peft_config=lora())
    assert trainer.model.is_loaded_in_4bit
    with pytest.raises(ValueError, match="use_vllm=True does not work with a base in 4 bits"):
        construct(tmp_path, saved_quantized, config={"use_vllm": True}, peft_config=lora())


def test_a_second_quantization_config_is_refused(tmp_path, base):
    with pytest.raises(
        ValueError, match="quantization_config=BitsAndBytesConfig would be ignored.*quantized to 4 bits"
    ):
        construct(tmp_path, load_nf4(base), quantization_config=NF4, peft_config=lora())


def test_a_quantization_config_for_a_loaded_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is loaded without quantization"):
        make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, trainer_arguments={"quantization_config": NF4})


@pytest.mark.parametrize("targets", ["lm_head", ["q_proj", "lm_head"], ["model.lm_head"], ".*(q_proj|lm_head)"])
def test_an_adapter_on_the_lm_head_is_refused(tmp_path, targets):
    with pytest.raises(ValueError, match="contains 'lm_head'.*Remove 'lm_head'"):
        construct(tmp_path, "nowhere/to-be-found", quantization_config=NF4, peft_config=lora(target_modules=targets))


@pytest.mark.parametrize("excluded", ["lm_head", ["lm_head"], ".*head"], ids=str)
@pytest.mark.parametrize("targets", [".*(q_proj|lm_head)", ["q_proj", "lm_head"]], ids=str)
def test_an_lm_head_that_is_excluded_again_is_no_target(tmp_path, targets, excluded):
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
    adapters = lora(target_modules=targets, exclude_modules=excluded)
    trainer = construct(tmp_path, model, peft_config=adapters)
    assert not any("lm_head" in name for name, weight in trainer.model.named_parameters() if weight.requires_grad)


def test_a_reference_of_a_model_without_a_name_is_refused(tmp_path):
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
    with pytest.raises(ValueError, match=r"beta=0.1 needs a reference.*Save it with model.save_pretrained\(folder\)"):
        construct(tmp_path, model, config={"beta": 0.1})


def test_a_reference_is_copied_from_the_adapter_named_default_only(tmp_path):
    model = get_peft_model(tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2), lora(), adapter_name="mine")
    with pytest.raises(ValueError, match="beta=0.1 with the adapter 'mine'.*named 'default'.*set beta=0.0"):
        construct(tmp_path, model, config={"beta": 0.1})
    assert set(model.peft_config) == {"mine"}


def test_a_reference_that_would_change_the_base_again_is_refused(tmp_path):
    torch.manual_seed(0)
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
    model = get_peft_model(model, lora(init_lora_weights="olora"))
    before = {name: weight.clone() for name, weight in model.named_parameters() if "base_layer" in name}
    with pytest.raises(ValueError, match="beta=0.1 with init_lora_weights='olora'.*init_lora_weights = True"):
        construct(tmp_path, model, config={"beta": 0.1})
    model.peft_config["default"].init_lora_weights = True
    construct(tmp_path, model, config={"beta": 0.1})
    assert "ref" in model.peft_config
    assert differing({name: dict(model.named_parameters())[name] for name in before}, before) == []


@pytest.mark.parametrize("form", ["name", "model", "model_init_kwargs", "8bit"])
def test_vllm_with_a_quantized_base_is_refused_with_the_reason(tmp_path, base, form):
    config = {"use_vllm": True}
    arguments = {
        "name": {"model": "nowhere/to-be-found", "quantization_config": NF4},
        "8bit": {"model": "nowhere/to-be-found", "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "model_init_kwargs": {"model": "nowhere/to-be-found"},
        "model": {"model": load_nf4(base) if form == "model" else None},
    }[form]
    if form == "model_init_kwargs":
        config["model_init_kwargs"] = {"quantization_config": {"load_in_4bit": True}}
    with pytest.raises(
        ValueError, match="use_vllm=True does not work with a base in [48] bits.*starting policy.*bf16 base"
    ):
        construct(tmp_path, peft_config=lora(), config=config, **arguments)


def test_adapters_that_do_not_require_a_gradient_are_refused(tmp_path, base):
    get_peft_model(load_nf4(base), lora()).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_nf4(base), tmp_path / "adapter")
    with pytest.raises(ValueError, match="requires a gradient.*is_trainable=True"):
        make_qlora_trainer(tmp_path, model, beta=0.1)


@pytest.mark.parametrize("shape", [{"hidden_size": 32}, {"num_layers": 3}])
def test_the_adapter_of_another_base_is_not_resumed_from(tmp_path, base, shape):
    other = save_base(tmp_path / "other", **shape)
    make_qlora_trainer(tmp_path / "run", other, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_qlora_trainer(tmp_path / "again", base, max_steps=2)
    with pytest.raises(
        ValueError, match=r"The adapter in .*checkpoint-1 was trained on '.*other' and does not fit '.*base"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_the_adapter_of_another_rank_is_not_resumed_from(tmp_path, base):
    make_qlora_trainer(tmp_path / "run", base, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_qlora_trainer(tmp_path / "again", get_peft_model(load_nf4(base), lora(r=2)), max_steps=2)
    with pytest.raises(ValueError, match=r"lora_A.weight is \(4, 256\) in the folder and \(2, 256\) in the model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_fits_the_model_that_saved_it_whatever_peft_calls_its_weights(tmp_path, changes):
    """PEFT renames DoRA's magnitudes and the adapters of an embedding as it saves them."""
    model = get_peft_model(tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2), lora(**changes))
    model.save_pretrained(tmp_path)
    check_adapter_folder(tmp_path, model)
    other = get_peft_model(tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2), lora(**changes | {"r": 2}))
    with pytest.raises(ValueError, match=r"does not fit.* is \(.*4.*\) in the folder and \(.*2.*\) in the model"):
        check_adapter_folder(tmp_path, other)
