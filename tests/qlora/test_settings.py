"""What a run with adapters says about itself at its start, and when it keeps silent."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.planner import Run, plan, shape_of
from grpo_plus.planner.loaded import shape_and_run
from grpo_plus.qlora import setting_check, settings
from tests.qlora.models import lora, make_qlora_trainer
from tests.training import make_trainer


def test_the_screen_names_quantization_dtypes_and_the_trained_share(tmp_path, base):
    trainer = make_qlora_trainer(tmp_path, base)
    overview, hints = setting_check(trainer.model, trainer.args)
    assert hints == []
    # Per layer: q, k, v, o of 64 x 64, gate, up, down of 64 x 256. LoRA of rank 4: 4 (in + out) each.
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 256)
    adapters = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 256))
    text = "\n".join(overview)
    assert "4 bits, nf4, double quantization, computed in bfloat16" in text
    assert f"linear layers  uint8, {linear:,} weights" in text
    assert f"adapters       float32, {adapters:,} weights" in text
    assert "embeddings     bfloat16, 12,800 weights" in text  # 100 tokens x 64, in and out
    assert f"trained        {adapters:,} of " in text
    assert "learning_rate=0.001" in text
    planned = plan(*shape_and_run(trainer.model, trainer.args))
    peak = f"{planned.peak / 2**30:.2f} GiB of GPU memory, in {planned.binding}"
    assert f"expected peak  {peak}, for prompts of 512 tokens" in text
    assert len(overview) <= 24


def test_the_plan_is_of_the_run_that_starts(tmp_path, base):
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 8, "beta": 0.04}
    given |= {"max_completion_length": 24, "optim": "adamw_8bit", "generation_chunk_size": 3, "packing": "none"}
    trainer = make_qlora_trainer(tmp_path, base, **given, bf16=True, steps_per_generation=2)
    shape, run = shape_and_run(trainer.model, trainer.args, 17)
    assert replace(shape, counted=None) == shape_of(json.loads((base / "config.json").read_text()), name=str(base))
    quantized = {
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "dtype": "bfloat16",
        "gradient_checkpointing": False,
    }
    adapters = {"lora_r": 4, "adapter_dtype": "float32"}
    assert run == Run(**given, **quantized, **adapters, prompt_length=17, steps_per_generation=2)


def test_an_expectation_that_cannot_be_had_says_why(tmp_path, base, monkeypatch):
    trainer = make_qlora_trainer(tmp_path, base)
    monkeypatch.setattr(type(trainer.model.config), "model_type", "nothing")
    overview, hints = setting_check(trainer.model, trainer.args)
    assert "expected peak  unknown: '" in overview[-1]
    assert "model_type='nothing', an architecture that neither the planner nor transformers" in overview[-1]
    assert hints == []


@pytest.mark.parametrize("fits", [True, False])
def test_a_run_that_is_too_large_for_the_gpu_is_told_what_to_change(tmp_path, base, monkeypatch, fits):
    trainer = make_qlora_trainer(tmp_path, base, generation_chunk_size=8, max_completion_length=100_000)
    peak = plan(*shape_and_run(trainer.model, trainer.args)).peak
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, peak if fits else peak - 2**20))
    _, hints = setting_check(trainer.model, trainer.args)
    if fits:
        assert hints == []
    else:
        assert re.search(rf"expects {peak / 2**30:.2f} GiB, in .*Cheapest changes: --\w+ ", hints[0])


def test_rows_that_generation_sizes_by_itself_are_no_reason_to_warn(tmp_path, base, monkeypatch):
    trainer = make_qlora_trainer(tmp_path, base, generation_chunk_size="auto", gradient_accumulation_steps=16)
    shape, run = shape_and_run(trainer.model, trainer.args)
    whole, single = (plan(shape, replace(run, generation_chunk_size=rows)) for rows in (128, 1))
    assert whole.binding == "generate"
    assert single.peak < whole.peak
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, single.peak))
    assert setting_check(trainer.model, trainer.args)[1] == []


def test_bfloat16_weights_under_float16_are_pointed_out(tmp_path, base):
    """fp16 itself needs a GPU: accelerate refuses it on a CPU."""
    trainer = make_qlora_trainer(tmp_path, base)
    trainer.args.fp16 = True
    _, hints = setting_check(trainer.model, trainer.args)
    assert len(hints) == 1
    assert re.search("fp16=True, but the weights.*dtype='float16'", hints[0])
    half = make_qlora_trainer(tmp_path, get_peft_model(quantized(base, dtype=torch.float16), lora()))
    half.args.fp16 = True
    assert setting_check(half.model, half.args)[1] == []


def test_cards_without_bfloat16_are_advised_float16(tmp_path, base):
    model = get_peft_model(quantized(base, dtype=torch.float32, bnb_4bit_compute_dtype=torch.float32), lora())
    trainer = make_qlora_trainer(tmp_path, model)
    trainer.args.fp16 = True
    _, hints = setting_check(trainer.model, trainer.args)
    assert len(hints) == 2
    assert "dtype='float16' (--dtype float16)" in hints[0]
    assert "bnb_4bit_compute_dtype=torch.float16 (on the command line: --dtype float16)" in hints[1]


def test_a_folder_that_was_saved_quantized_gets_hints_that_can_be_followed(tmp_path, base):
    """transformers keeps the folder's settings, whatever dtype is asked for."""
    settings = {"bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": torch.bfloat16}
    quantized(base, **settings).save_pretrained(tmp_path / "nf4")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float16)
    trainer = make_qlora_trainer(tmp_path, get_peft_model(saved, lora()))
    trainer.args.fp16 = True
    _, hints = setting_check(trainer.model, trainer.args)
    assert len(hints) == 2
    for hint in hints:
        assert re.search(
            r"nf4' was saved with these settings.*qlora\(dtype='float16'\) \(--qlora --dtype float16", hint
        )
    assert "4-bit weights are computed in bfloat16" in hints[1]


@pytest.mark.parametrize(("beta", "init"), [(0.1, "olora"), (0.0, "olora"), (0.1, True)])
def test_a_reference_that_the_adapters_start_has_changed_is_pointed_out(tmp_path, beta, init):
    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        beta=beta,
        trainer_arguments={"peft_config": lora(init_lora_weights=init)},
    )
    _, hints = setting_check(trainer.model, trainer.args)
    assert bool(hints) == (beta > 0 and init == "olora")
    for hint in hints:
        assert re.search("beta=0.1 with init_lora_weights='olora'.*has changed.*Set beta=0.0", hint)


def test_it_is_logged_at_info_and_silent_above(tmp_path, base, caplog):
    def logged(level):
        caplog.clear()
        caplog.set_level(level, logger="grpo_plus")
        make_qlora_trainer(tmp_path, base)
        return [record for record in caplog.records if record.name == "grpo_plus"]

    (record,) = logged(logging.INFO)
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("Settings of ")
    assert logged(logging.WARNING) == []


def quantized(base, **changes):
    config = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16} | changes
    dtype = config.pop("dtype", torch.bfloat16)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **config)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=dtype)


@pytest.mark.parametrize(
    ("model", "adapters", "config", "hint"),
    [
        ({"dtype": torch.float32}, {}, {}, "The embeddings are float32.*Load the model with dtype='bfloat16'"),
        ({"bnb_4bit_compute_dtype": torch.float32}, {}, {}, "computed in float32.*bnb_4bit_compute_dtype=torch.bfloat16"),
        ({"bnb_4bit_use_double_quant": False}, {}, {}, "No double quantization.*bnb_4bit_use_double_quant=True"),
        ({}, {"lora_dropout": 0.05}, {}, "lora_dropout=0.05: the update.*ratio.*Set lora_dropout=0.0"),
        ({}, {}, {"adapter_dtype": "bfloat16", "learning_rate": 1e-6}, "too small for adapters in bfloat16.*adapter_dtype='float32'"),
        ({}, {}, {"learning_rate": 1e-10}, "learning_rate=1e-10 is too small for adapters in float32.*larger learning_rate"),
    ],
)  # fmt: skip
def test_what_hurts_is_one_hint_with_its_remedy(tmp_path, base, caplog, model, adapters, config, hint):
    wrapped = get_peft_model(quantized(base, **model), lora(**adapters))
    trainer = make_qlora_trainer(tmp_path, wrapped, packing="none", **config)
    _, hints = setting_check(trainer.model, trainer.args)
    assert len(hints) == 1
    assert re.search(hint, hints[0])
    assert hints[0] in caplog.text


def test_the_bytes_in_the_hints_are_those_that_the_remedy_saves(tmp_path, base, monkeypatch):
    monkeypatch.setattr(settings, "GIB", 1)
    wide = get_peft_model(quantized(base, dtype=torch.float32), lora())
    _, hints = setting_check(wide, make_qlora_trainer(tmp_path, wide).args)
    # 100 tokens x 64, in and out; two bytes less each.
    assert "the embeddings alone take 25600.00 GiB less" in hints[0]
    single = get_peft_model(quantized(base, bnb_4bit_use_double_quant=False), lora())
    _, hints = setting_check(single, make_qlora_trainer(tmp_path, single).args)
    # 131 072 weights at 0.5625 bytes and at 0.5 + 1/64 + 4/16384
    assert f"the scales take {131_072 * (3 / 64 - 1 / 4096):.2f} GiB more" in hints[0]


def test_adapters_above_an_ordinary_base_have_a_screen_too(tmp_path):
    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        trainer_arguments={"peft_config": lora()},
    )
    overview, hints = setting_check(trainer.model, trainer.args)
    assert any(line.split() == ["quantized", "no"] for line in overview)
    assert hints == []
