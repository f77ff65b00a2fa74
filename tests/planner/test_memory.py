import dataclasses
from typing import Any

import pytest

from grpo_plus.planner import QLORA, Constants, Run, plan, shape_of
from grpo_plus.planner.activations import attention_activations, layer_activations, weight_copies
from grpo_plus.planner.constants import GIB
from grpo_plus.planner.memory import weight_bytes
from grpo_plus.planner.update import update_bytes
from tests.planner.configs import LLAMA_3_1_8B, QWEN3_1_7B, QWEN3_4B, QWEN3_8B
from tests.planner.tracking import count

TRL: dict[str, Any] = {"packing": "none", "max_tokens_per_pass": None, "lora_r": 16, "adapter_dtype": "bfloat16"}
TRL_NF4 = TRL | {"load_in_4bit": True}
TUNED = TRL_NF4 | {"use_bnb_nested_quant": True, "dtype": "bfloat16", "optim": "adamw_8bit"}
ROWS = {"prompt_length": 192, "max_completion_length": 64, "per_device_train_batch_size": 2, "num_generations": 2}

MODES = {
    "bf16 LoRA": TRL | {"dtype": "bfloat16"},
    "bf16, fp32 LoRA": TRL | {"dtype": "bfloat16", "adapter_dtype": "float32"},
    "fp32 LoRA": TRL | {"adapter_dtype": "float32"},
    "fp32, bf16 LoRA": TRL,
    "all weights": {"packing": "none"},
    "all bf16, no autocast": {"packing": "none", "dtype": "bfloat16", "bf16": False},
}
GEMMA_3_4B = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 8,
    "num_hidden_layers": 34,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "vocab_size": 262144,
}
MISTRAL_7B = LLAMA_3_1_8B | {"model_type": "mistral", "sliding_window": None, "vocab_size": 32000}
PHI_4_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
    "pad_token_id": None,
}
MODELS = {
    "Qwen3-4B": QWEN3_4B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Gemma-3-4B": GEMMA_3_4B,
    "Mistral-7B": MISTRAL_7B,
    "Phi-4-mini": PHI_4_MINI,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_saves_what_autograd_saves(model, mode):
    shape, run = shape_of(MODELS[model]), Run(**ROWS | MODES[mode], gradient_checkpointing=False)
    tokens = 2 * (192 + 64)
    layer = shape.layers[0]
    predicted = (
        tokens * layer_activations(shape, layer, run)
        + attention_activations(shape, layer, run)
        + weight_copies(shape, layer, run)
    )
    counted = count(MODELS[model], run, layers=2).kept - count(MODELS[model], run, layers=1).kept
    assert predicted == pytest.approx(counted, rel=0.08)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_forward_and_backward_peak_where_allocations_do(mode, checkpointing):
    rows = ROWS | {"prompt_length": 1000, "max_completion_length": 24, "gradient_checkpointing": checkpointing}
    run, layers = Run(**rows | MODES[mode]), 8
    shape = shape_of(QWEN3_4B | {"num_hidden_layers": layers, "vocab_size": 128})
    predicted = sum(update_bytes(shape, run, Constants()).values())
    assert predicted == pytest.approx(count(QWEN3_4B, run, layers=layers).peak, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        # Measured on a CPU per token of a Qwen3-4B layer, without LoRA's own small tensors: reference/qlora.md, section 4.
        (TUNED, 160_780),
        (TRL_NF4, 235_020),
        (TRL_NF4 | {"lora_dropout": 0.05}, 296_460),
    ],
    ids=["all bf16", "TRL's defaults", "with dropout"],
)
def test_a_layer_of_qwen3_4b_saves_what_was_measured(settings, measured):
    shape, run = shape_of(QWEN3_4B), Run(**settings)
    # 4 * 4096 elements of two bytes: queries, repeated keys and values, and the output of attention.
    predicted = layer_activations(shape, shape.layers[0], run) + 4 * 4096 * 2
    tolerance = 0.1 if run.lora_dropout else 0.01  # a CPU's dropout mask has two bytes, a GPU's one
    assert predicted == pytest.approx(measured, rel=tolerance)


def test_cards_without_bfloat16_need_as_much_in_float16():
    shape = shape_of(QWEN3_4B)
    whole = QLORA | {"max_tokens_per_pass": None, "beta": 0.04}
    older = Run(**whole | {"dtype": "float16"}, bf16=False, fp16=True)
    assert plan(shape, older).phases == plan(shape, Run(**whole)).phases
    # Without autocast, adapters in float32 take their inputs in float32.
    wide = plan(shape, Run(**whole | {"dtype": "float16"}, bf16=False))
    assert wide.phase("update") > plan(shape, older).phase("update")


def test_weights_in_nf4():
    # Qwen3-4B: 3 633 315 840 in linear layers; 388 956 160 in the embedding and 196 096 in norms stay as they are.
    shape = shape_of(QWEN3_4B)
    others = 388_956_160 + 196_096
    assert weight_bytes(shape, Run(**TUNED)) == 3_633_315_840 * (0.5 + 1 / 64 + 4 / 16384) + 2 * others
    assert weight_bytes(shape, Run(**TRL_NF4)) == 3_633_315_840 * 0.5625 + 4 * others
    assert weight_bytes(shape, Run(dtype="bfloat16")) == 2 * shape.parameters


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_takes_what_bitsandbytes_takes(nested):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    weight = bitsandbytes.nn.Params4bit(
        torch.randn(1024, 2048), requires_grad=False, quant_type="nf4", compress_statistics=nested
    ).to("cpu")
    state = weight.quant_state
    scales = [state.absmax] if not nested else [state.absmax, state.state2.absmax]
    taken = weight.data.nbytes + sum(scale.nbytes for scale in scales)
    shape = shape_of(QWEN3_4B)
    per_weight = (weight_bytes(shape, Run(**TUNED | {"use_bnb_nested_quant": nested})) - 2 * (
        shape.parameters - shape.linear
    )) / shape.linear  # fmt: skip
    assert taken / weight.numel() / (1024 * 2048 / weight.numel()) == pytest.approx(per_weight, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "per_token"),
    # 2 * layers * key-value heads * head_dim * 2 bytes
    [(QWEN3_4B, 144), (QWEN3_8B, 144), (LLAMA_3_1_8B, 128), (QWEN3_1_7B, 112)],
)
def test_the_cache_of_a_token(config, per_token):
    shape = shape_of(config)
    short, long = (
        plan(shape, Run(**TUNED, max_completion_length=length), constants=Constants(fragmentation=1))
        for length in (1000, 1001)
    )
    grown = long.phases["generate"]["KV cache"] - short.phases["generate"]["KV cache"]
    assert grown == 8 * per_token * 1024


def test_float32_weights_double_the_cache_of_peft():
    shape = shape_of(QWEN3_4B)
    small, large = (plan(shape, Run(**settings)).phases["generate"]["KV cache"] for settings in (TUNED, TRL_NF4))
    assert large == 2 * small


def test_a_window_bounds_the_cache():
    shape = shape_of(GEMMA_3_4B)
    constants = Constants(fragmentation=1)
    caches = [
        plan(shape, Run(**TUNED, max_completion_length=length), constants=constants).phases["generate"]["KV cache"]
        for length in (4000, 4001)
    ]
    # Of 34 layers, each sixth attends to everything: 5 of them, with 4 heads of 256, keys and values of two bytes.
    assert caches[1] - caches[0] == 8 * 5 * 2 * 4 * 256 * 2
    # The others keep the window less the token that is being generated.
    assert caches[0] == 8 * (5 * 4512 + 29 * 1023) * 2 * 4 * 256 * 2


@pytest.mark.parametrize(
    ("length", "settings", "batch", "rows", "train", "generate"),
    [
        # reference/qlora.md, section 4: an older arithmetic by hand, Qwen3-4B, prompts of 256, in GiB.
        (512, TRL_NF4, 8, 8, 8.4, 6.5),
        (512, TUNED, 8, 8, 5.7, 4.4),
        (1024, TRL_NF4, 8, 8, 10.9, 7.7),
        (1024, TUNED, 8, 8, 7.1, 5.0),
        (1024, TUNED, 1, 8, 4.0, 5.0),
        (1024, TRL_NF4, 1, 32, 5.5, 16.8),
        (1024, TUNED, 1, 32, 4.0, 9.6),
        (4096, TUNED, 1, 8, 5.1, 8.7),
    ],
)
def test_the_estimates_made_before(length, settings, batch, rows, train, generate):
    run = Run(
        **settings,
        prompt_length=256,
        max_completion_length=length,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=rows // batch,
    )
    planned = plan(shape_of(QWEN3_4B), run)
    assert planned.phase("update") / GIB == pytest.approx(train, rel=0.08)
    assert planned.phase("generate") / GIB == pytest.approx(generate, rel=0.08)


@pytest.mark.parametrize(
    ("optim", "adapter_dtype", "per_parameter"),
    # Weight, gradient and state, as reference/qlora.md has them: 8 in TRL's bfloat16, 16 in float32, ~6.1 and ~10.1.
    [
        ("adamw_torch_fused", "bfloat16", 8),
        ("adamw_torch_fused", "float32", 16),
        ("adamw_8bit", "bfloat16", 4 + 2 * (1 + 4 / 256)),
        ("adamw_8bit", "float32", 8 + 2 * (1 + 4 / 256)),
        ("paged_adamw_32bit", "bfloat16", 4 + 8),
        ("lion_8bit", "float32", 8 + 1 + 4 / 256),
        ("sgd", "float32", 8),
    ],
)
def test_bytes_of_what_trains(optim, adapter_dtype, per_parameter):
    shape = shape_of(QWEN3_4B)
    run = Run(**TUNED | {"optim": optim, "adapter_dtype": adapter_dtype})
    planned = plan(shape, run)
    causes = planned.phases["optimizer"]
    trained = (
        causes["adapters"] + causes["gradients"] + causes["optimizer state"] + planned.on_host.get("optimizer state", 0)
    )
    assert trained == pytest.approx(per_parameter * shape.lora(16))


def test_8_bit_states_take_what_bitsandbytes_takes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.randn(64, 1024))
    optimizer = bitsandbytes.optim.AdamW8bit([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = [value for name, value in optimizer.state[weight].items() if name.startswith(("state", "absmax"))]
    assert sum(value.nbytes for value in state) / weight.numel() == 2 * (1 + 4 / 256)


def test_the_peak_is_the_largest_phase_and_not_their_sum():
    planned = plan(shape_of(QWEN3_4B), Run(**TUNED))
    sums = {name: sum(causes.values()) for name, causes in planned.phases.items()}
    assert planned.peak == max(sums.values()) == sums[planned.binding]
    usable = planned.peak + planned.constants.unusable_bytes
    assert planned.fits(usable)
    assert not planned.fits(usable - 1)


def test_the_phases_that_a_run_has():
    shape = shape_of(QWEN3_4B)
    assert list(plan(shape, Run()).phases) == ["load", "generate", "update", "optimizer"]
    assert "score" in plan(shape, Run(beta=0.04)).phases
    assert "score" in plan(shape, Run(num_iterations=2)).phases
    assert "score" in plan(shape, Run(gradient_accumulation_steps=2, steps_per_generation=4)).phases


def test_a_reference_is_a_second_model_only_without_adapters():
    shape = shape_of(QWEN3_4B)
    full, adapted = plan(shape, Run(beta=0.04)), plan(shape, Run(beta=0.04, lora_r=16))
    assert full.phases["generate"]["reference model"] == weight_bytes(shape, Run())
    assert "reference model" not in adapted.phases["generate"]


def test_a_shared_prompt_is_kept_once():
    # 8 rows of one prompt: 512 + 8 * 512 tokens in place of 8 * 1024, 36 layer inputs of 2560 elements of two bytes.
    shape, constants = shape_of(QWEN3_4B), Constants(fragmentation=1)
    shared = plan(shape, Run(**TUNED | {"packing": "auto"}), constants=constants).phases["update"]
    padded = plan(shape, Run(**TUNED), constants=constants).phases["update"]
    assert shared["layer inputs"] == (512 + 8 * 512) * 36 * 2560 * 2
    masks = 8 * 1024 * 1024
    assert padded["layer inputs"] == 8 * 1024 * 36 * 2560 * 2 + masks


def test_chunks_bound_what_is_generated_at_once():
    shape = shape_of(QWEN3_4B)
    whole, chunked = (plan(shape, Run(**TUNED, generation_chunk_size=chunk)) for chunk in (None, 2))
    assert whole.phases["generate"]["KV cache"] == 4 * chunked.phases["generate"]["KV cache"]
    assert whole.phases["update"] == chunked.phases["update"]


def test_the_factor_on_activations_is_used():
    shape, run = shape_of(QWEN3_4B), Run(**TUNED)
    once, twice = (
        plan(shape, run, constants=Constants(activations=factor)).phases["update"]["one layer"] for factor in (1, 2)
    )
    assert 1.5 * once < twice < 2 * once


@pytest.mark.parametrize("field", ["fragmentation", "context_bytes", "sampling_copies", "head_vocab", "head_tokens"])
def test_every_constant_is_used(field):
    small = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape = shape_of(QWEN3_4B | small | {"num_hidden_layers": 2})
    constants = dataclasses.replace(Constants(), **{field: 2 * getattr(Constants(), field)})
    run = Run(prompt_length=8, max_completion_length=1024, max_tokens_per_pass=None, lora_r=16)
    assert plan(shape, run, constants=constants).phases != plan(shape, run).phases


def test_the_table_says_what_the_plan_holds():
    planned = plan(shape_of(QWEN3_4B), Run(**QLORA, beta=0.04))
    lines = planned.table().splitlines()
    assert lines[0].split() == ["GiB", *planned.phases]
    assert lines[-2].split()[1:] == [f"{planned.phase(name) / GIB:.2f}" for name in planned.phases]
    assert lines[-1] == f"peak: {planned.peak / GIB:.2f} GiB, in {planned.binding}"
