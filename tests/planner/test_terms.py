"""Every term of the arithmetic by hand, each where it decides."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_plus.planner import QLORA, Constants, Run, plan, shape_of
from grpo_plus.planner.activations import attention_activations, weight_copies
from grpo_plus.qlora.lora_layers import fused_lora
from tests.planner.configs import QWEN3_4B

EXACT = Constants(context_bytes=0, fragmentation=1)
LORA: dict[str, Any] = {
    "lora_r": 16,
    "adapter_dtype": "bfloat16",
    "dtype": "bfloat16",
    "packing": "none",
    "max_tokens_per_pass": None,
}
ONE_ROW: dict[str, Any] = {"per_device_train_batch_size": 1, "num_generations": 1}
QWEN = shape_of(QWEN3_4B)
HIDDEN, LAYERS, QUERY, KEYS, WIDTH, VOCAB = 2560, 36, 4096, 1024, 9728, 151_936
LINEAR = LAYERS * (HIDDEN * (2 * QUERY + 2 * KEYS) + 3 * HIDDEN * WIDTH)


def phases(run: Run, config: dict[str, Any] = QWEN3_4B) -> Any:
    return plan(shape_of(config), run, constants=EXACT).phases


def test_loading_holds_the_largest_tensor_twice():
    assert phases(Run(**LORA))["load"]["being loaded"] == 2 * VOCAB * HIDDEN
    small_vocabulary = QWEN3_4B | {"vocab_size": 128}
    assert phases(Run(**LORA), small_vocabulary)["load"]["being loaded"] == 2 * HIDDEN * WIDTH
    experts = small_vocabulary | {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
    }
    assert phases(Run(**LORA), experts)["load"]["being loaded"] == 2 * 8 * 3 * HIDDEN * 768


def test_the_unfused_adam_copies_what_trains():
    run = Run(**LORA, optim="adamw_torch")
    assert phases(run)["optimizer"]["optimizer copies"] == 2 * QWEN.lora(16)
    assert "optimizer copies" not in phases(Run(**LORA, optim="adamw_torch_fused"))["optimizer"]


def test_gradients_live_through_a_generation_within_an_optimizer_step():
    """16 passes make a step and 4 of them a generation batch: three generations find gradients of the passes before."""
    settings = LORA | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 16, "beta": 0.04}
    gradients = 2 * QWEN.lora(16)
    within = phases(Run(**settings, steps_per_generation=4))
    assert within["generate"]["gradients"] == within["score"]["gradients"] == gradients
    for steps in (16, 32):
        between = phases(Run(**settings, steps_per_generation=steps))
        assert "gradients" not in between["generate"]
        assert "gradients" not in between["score"]


def test_linear_attention_remembers_a_state_and_no_positions():
    config = QWEN3_4B | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention"] * 3,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
    }
    # Convolution: 4 steps of 2 x 16 + 32 channels; recurrence: 4 heads of 8 x 8. In float32, for 8 rows and 3 layers.
    state = 8 * 3 * 4 * (4 * 64 + 4 * 64)
    for length in (64, 512):
        run = Run(**LORA, max_completion_length=length, prompt_length=1)
        assert phases(run, config)["generate"]["KV cache"] == state


def test_prompts_that_are_long_bind_the_prefill():
    generate = phases(Run(**LORA, prompt_length=2048, max_completion_length=1))["generate"]
    tokens = 8 * 2048
    assert generate["KV cache"] == tokens * LAYERS * 2 * KEYS * 2
    # The residual twice and the MLP's three halves, and a mask of one byte per pair.
    assert generate["activations"] == tokens * (2 * HIDDEN + 3 * WIDTH) * 2 + 8 * 2048**2
    assert "logits" not in generate


def test_the_last_token_has_the_whole_cache_one_layers_keys_twice_and_logits():
    generate = phases(Run(**LORA, prompt_length=64, max_completion_length=960))["generate"]
    assert generate["KV cache"] == 8 * 1024 * LAYERS * 2 * KEYS * 2
    assert generate["activations"] == 8 * 1024 * KEYS * 2
    assert generate["logits"] == 8 * VOCAB * (2 + 3 * 4)


def test_the_cache_of_a_float32_model_that_autocast_reaches_is_half_in_float32():
    """Rotary embeddings in float32 widen the keys; PEFT's generation runs beneath autocast, where both are wide."""
    settings: dict[str, Any] = {"packing": "none", "prompt_length": 64, "max_completion_length": 960}
    assert phases(Run(**settings))["generate"]["KV cache"] == 8 * 1024 * LAYERS * KEYS * (4 + 2)
    assert phases(Run(**settings, lora_r=16))["generate"]["KV cache"] == 8 * 1024 * LAYERS * KEYS * (4 + 4)
    assert phases(Run(**settings, bf16=False))["generate"]["KV cache"] == 8 * 1024 * LAYERS * KEYS * (4 + 4)


def test_scoring_binds_in_a_layer_or_in_the_head():
    rows = {"prompt_length": 1024, "max_completion_length": 8}
    long_prompts = phases(Run(**LORA, **rows, beta=0.04))["score"]
    tokens = 8 * 1032
    assert long_prompts["activations"] == tokens * (2 * HIDDEN + 3 * WIDTH) * 2 + 8 * 1032**2
    assert "logits" not in long_prompts
    narrow = QWEN3_4B | {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    rows = {"prompt_length": 1, "max_completion_length": 64}
    score = phases(Run(**LORA, **rows, beta=0.04), narrow)["score"]
    assert score["activations"] == 8 * 65 * 64 * (2 + 4)
    assert score["logits"] == 8 * 64 * 32768 * 2 + 8 * 64 * 64 * 2


@pytest.mark.parametrize("lora_r", [None, 16])
def test_the_head_of_a_model_that_trains_has_a_gradient_of_its_own(lora_r):
    narrow = QWEN3_4B | {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    run = Run(**LORA | {"lora_r": lora_r}, prompt_length=1, max_completion_length=64)
    tile = 8 * 64 * 32768 * 2
    hidden = 8 * 65 * 64 * (4 + 2 * 2) + 8 * 64 * 64 * (2 * 2 + 4)
    trained = 0 if lora_r else VOCAB * 64 * (4 + 2)
    assert phases(run, narrow)["update"]["logits"] == tile + hidden + trained


def test_autocast_keeps_a_half_precision_copy_of_every_trained_weight():
    rows = ONE_ROW | {"prompt_length": 1, "max_completion_length": 1, "packing": "none"}
    assert phases(Run(**rows))["update"]["one layer"] == 2 * LINEAR
    assert phases(Run(**rows, bf16=False))["update"].get("one layer", 0) < 2 * LINEAR


def test_attention_of_a_shared_prompt_saves_it_once_and_a_copy_for_each_completion():
    run = Run(**QLORA, prompt_length=100, max_completion_length=20, max_tokens_per_pass=None, num_generations=4)
    # Two prompts attend to themselves: queries and output, keys and values. Eight completions of 20 attend to 120 places,
    # keys and values repeated for every query head; one mask serves them all.
    expected = 2 * (2 * 100 * 2 * (QUERY + KEYS) + 8 * QUERY * (2 * 20 + 2 * 120) + 20 * 120)
    assert attention_activations(QWEN, QWEN.layers[0], run) == expected


def test_attention_of_a_completion_alone_with_its_prompt_has_neither_mask_nor_repeated_keys():
    run = Run(**QLORA | ONE_ROW, prompt_length=100, max_completion_length=20)
    assert attention_activations(QWEN, QWEN.layers[0], run) == 2 * 120 * 2 * (QUERY + KEYS)
    # In a model with linear attention the prompt goes through the cache, and its keys are repeated.
    hybrid = replace(QWEN, layers=(*QWEN.layers, replace(QWEN.layers[0], query=0, keys=0, state=64)))
    through_the_cache = 2 * (100 * 2 * (QUERY + KEYS) + QUERY * (2 * 20 + 2 * 120) + 20 * 120)
    assert attention_activations(hybrid, hybrid.layers[0], run) == through_the_cache


def test_a_pass_holds_as_many_rows_as_its_tokens_allow_and_at_least_one():
    run = Run(prompt_length=100, max_completion_length=20, per_device_train_batch_size=8, num_generations=4)
    bounds = {None: 8, "auto": 1, 1: 1, 140: 2, 180: 4, 299: 4, 300: 5, 360: 8, 10_000: 8}  # a prompt once for 4 rows
    assert {bound: replace(run, max_tokens_per_pass=bound).rows_per_pass for bound in bounds} == bounds
    # TRL has no passes of its own accord. A bound that is given holds for padded rows, too.
    padded = replace(run, packing="none")
    assert [replace(padded, max_tokens_per_pass=bound).rows_per_pass for bound in ("auto", 240)] == [8, 2]


def test_the_update_holds_one_pass_and_the_generation_all_rows():
    whole, parts = (phases(Run(**QLORA, max_tokens_per_pass=bound)) for bound in (None, 512 + 2 * 512))
    alone = phases(Run(**QLORA | {"per_device_train_batch_size": 2, "num_generations": 2}, max_tokens_per_pass=None))
    assert parts["update"] == alone["update"] != whole["update"]
    assert parts["generate"] == whole["generate"]


def test_layer_inputs_on_the_host_leave_three_on_the_card():
    run = Run(**QLORA | ONE_ROW, max_completion_length=10_000, offload_activations=True)
    one = 10_512 * HIDDEN * 2
    planned = plan(QWEN, run, constants=EXACT)
    assert planned.phases["update"]["layer inputs"] == 3 * one
    assert planned.on_host == {"layer inputs": LAYERS * one}
    assert planned.host == LAYERS * one
    assert "on the host: 1.80 GiB of layer inputs" in planned.table()
    # Without checkpointing there are no layer inputs to keep.
    kept = plan(QWEN, replace(run, gradient_checkpointing=False), constants=EXACT)
    assert kept.on_host == {}


def test_in_tiles_a_layer_needs_what_attention_needs():
    run = Run(**QLORA | ONE_ROW, max_completion_length=99_488, mlp_tile_tokens=4096)
    tokens, (query, keys) = 100_000, (QUERY, KEYS)
    # Inputs of the projections, of the MLP and of the norm before it; of the norms of queries and keys; attention's.
    saved = 2 * (3 * HIDDEN + query + keys + 2 * (query + keys))
    # Derivatives of attention's output, queries, keys, values; two of the residual, and the one that comes in.
    derivatives = 2 * 2 * (query + keys) + 3 * 2 * HIDDEN
    assert phases(run)["update"]["one layer"] == tokens * (saved + derivatives)
    assert phases(replace(run, mlp_tile_tokens=None))["update"]["one layer"] > 2 * tokens * (saved + derivatives)
    # Experts are not tiled, and neither is what fits into one tile.
    mixture = QWEN3_4B | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    short = replace(run, max_completion_length=4096 - 512)
    for config, untiled in ((mixture, run), (QWEN3_4B, short)):
        tiled, whole = (phases(replace(untiled, mlp_tile_tokens=tile), config) for tile in (4096, None))
        assert tiled == whole


def test_tiles_are_on_under_checkpointing_and_never_trls():
    tiles = {"auto": 4096, None: None, 512: 512}
    assert {given: Run(mlp_tile_tokens=given).tile_tokens for given in tiles} == tiles
    assert Run(gradient_checkpointing=False).tile_tokens is None
    assert Run(packing="none").tile_tokens is None


def test_tiles_without_checkpointing_leave_the_inputs_of_norms_and_mlps():
    run = Run(**QLORA | ONE_ROW, max_completion_length=9488, gradient_checkpointing=False, mlp_tile_tokens=1000)
    saved = LAYERS * 10_000 * 2 * (4 * HIDDEN + QUERY + KEYS + 2 * (QUERY + KEYS))
    assert phases(run)["update"]["saved activations"] == saved


def test_paged_state_is_on_the_host_but_for_small_tensors_and_the_one_that_steps():
    paged = plan(QWEN, Run(optim="paged_adamw_8bit"), constants=EXACT)
    small = sum(layer.others for layer in QWEN.layers) + HIDDEN
    per_weight = 2 * (1 + 4 / 256)
    assert paged.phases["update"]["optimizer state"] == pytest.approx(small * per_weight)
    assert paged.on_host["optimizer state"] == pytest.approx((QWEN.parameters - small) * per_weight)
    assert paged.phases["optimizer"]["optimizer copies"] == pytest.approx(VOCAB * HIDDEN * per_weight)
    # Of adapters of rank 16, those on the wide side of the MLP have 100,000 elements or more: three in a layer.
    adapted = plan(QWEN, Run(**LORA, optim="paged_adamw_8bit"), constants=EXACT)
    assert adapted.on_host["optimizer state"] == pytest.approx(LAYERS * 3 * 16 * WIDTH * per_weight)
    assert plan(QWEN, Run(optim="adamw_8bit")).on_host == {}


@pytest.mark.parametrize(("packing", "scores"), [("none", 8 * 120 * 120), ("shared_prompt", 8 * 20 * 120 + 100 * 100)])
def test_eager_attention_saves_its_scores_twice(packing, scores):
    gemma2 = QWEN3_4B | {"model_type": "gemma2", "head_dim": 256, "num_attention_heads": 8, "sliding_window": 4096}
    shape = shape_of(gemma2)
    run = Run(**LORA | {"packing": packing}, prompt_length=100, max_completion_length=20)
    expected = scores * 8 * (4 + 2) + 8 * 120 * 4 * (8 * 256) * 2
    assert attention_activations(shape, shape.layers[0], run) == expected


def test_adapters_of_experts_are_multiplied_out_and_added():
    mixtral = QWEN3_4B | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    shape = shape_of(mixtral)
    assert weight_copies(shape, shape.layers[0], Run(**LORA)) == 2 * 2 * (4 * 3 * HIDDEN * WIDTH)
    assert weight_copies(QWEN, QWEN.layers[0], Run(**LORA)) == 0


def test_our_layers_keep_copies_of_the_adapters():
    ours = LORA | {"packing": "auto", "adapter_dtype": "float32"}
    halves = 2 * QWEN.lora(16)
    planned = phases(Run(**ours))
    assert {name: causes.get("adapter copies") for name, causes in planned.items()} == {
        "load": None,
        "generate": halves,
        "update": halves,
        "optimizer": halves,
    }
    # Of adapters in half precision: the A of q, k and v, and of gate and up, one below the other.
    stacked = 2 * 16 * LAYERS * 5 * HIDDEN
    assert phases(Run(**ours | {"adapter_dtype": "bfloat16"}))["update"]["adapter copies"] == stacked
    assert phases(Run(**ours, bf16=False))["update"]["adapter copies"] == 2 * stacked
    for without in ({"packing": "none"}, {"lora_dropout": 0.1}, {"lora_r": None}):
        assert "adapter copies" not in phases(Run(**ours | without))["update"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_planned_copies_are_those_of_a_model(dtype):
    config = QWEN3_4B | {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype)) if weight.requires_grad else weight.data
    with fused_lora(model) as products, torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with products.held():
                model(input_ids=torch.arange(4)[None])
        targets = [target for siblings in products._kept.values() for target in siblings.copies(torch.bfloat16)[1]]
    kept = {target.untyped_storage()._cdata: target.untyped_storage().nbytes() for target in targets}
    run = Run(**LORA | {"lora_r": 4, "adapter_dtype": dtype, "packing": "auto"})
    assert sum(kept.values()) == phases(run, config)["update"]["adapter copies"] > 0
