"""The costs on 8 and 64 GPUs, against the arithmetic by hand."""

from dataclasses import replace

import pytest

from benchmarks import scale
from grpo_plus.planner import Run, plan, shape_of
from grpo_plus.planner.constants import GIB

QWEN = shape_of(scale.CONFIGS["Qwen3-8B"])
LORA, FULL = scale.TRAINS["LoRA"], scale.TRAINS["all weights"]
ENGINES = {engine.name: engine for engine in scale.ENGINES}


def test_the_models_have_as_many_parameters_as_their_names_say():
    sizes = {name: round(shape_of(config).parameters / 1e9, 1) for name, config in scale.CONFIGS.items()}
    assert sizes == {"Qwen3-8B": 8.2, "Llama-3.1-8B": 8.0, "Qwen3-32B": 32.8, "Llama-3.1-70B": 70.6}


def test_ddp_sends_gradients_twice_and_spread_weights_go_round_three_times():
    weights, adapters = QWEN.parameters, QWEN.lora(16)
    assert scale.sent(QWEN, FULL, ENGINES["DDP"], 8) == 2 * 7 / 8 * 4 * weights
    assert scale.sent(QWEN, FULL, ENGINES["ZeRO-2"], 8) == 2 * 7 / 8 * 2 * weights
    assert scale.sent(QWEN, FULL, ENGINES["FSDP2"], 8) == 3 * 7 / 8 * 2 * weights
    assert scale.sent(QWEN, LORA, ENGINES["DDP"], 2) == 4 * adapters
    assert scale.sent(QWEN, LORA, ENGINES["ZeRO-3"], 2) == 2 * weights + adapters


def test_nothing_is_sent_by_one_gpu():
    assert [scale.sent(QWEN, FULL, engine, 1) for engine in scale.ENGINES] == [0] * 5


@pytest.mark.parametrize(("name", "bytes_spread"), [("ZeRO-1", 12), ("ZeRO-2", 14), ("ZeRO-3", 16), ("FSDP2", 16)])
def test_what_is_spread_shrinks_with_the_gpus(name, bytes_spread):
    """From 8 GPUs to 64, a GPU loses 1/8 - 1/64 = 7/64 of what is spread, in bytes of each weight."""
    few, many = (scale.update_memory(QWEN, FULL, ENGINES[name], gpus) for gpus in (8, 64))
    assert few - many == pytest.approx(7 / 64 * bytes_spread * QWEN.parameters)


def test_ddp_adds_copies_of_the_gradients_to_the_plan_of_one_gpu():
    planned = plan(QWEN, LORA)
    expected = planned.phase("update") + planned.phases["update"]["gradients"]
    assert [scale.update_memory(QWEN, LORA, ENGINES["DDP"], gpus) for gpus in (8, 64)] == [expected] * 2


def test_an_update_of_one_short_row_takes_the_operations_counted_by_hand():
    """2 + 3 tokens, through all layers three times, and 3 through the head. Pairs: 2 within the prompt, 6 + 4.5 after."""
    run = Run(prompt_length=2, max_completion_length=3, per_device_train_batch_size=1, num_generations=1, lora_r=1)
    products, attention = 5 * QWEN.linear + 3 * QWEN.head, 36 * 32 * 128 * 12.5
    assert scale.operations(QWEN, run) == 3 * (2 * products + 4 * attention)
    assert scale.operations(QWEN, replace(run, lora_r=None)) == 4 * (2 * products + 4 * attention)


def test_a_base_of_70_b_in_nf4_fits_into_48_gb():
    planned = plan(shape_of(scale.CONFIGS["Llama-3.1-70B"]), scale.TRAINS["LoRA on nf4"])
    assert planned.fits(48 * GIB)
