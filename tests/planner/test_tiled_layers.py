"""What a layer of a real model keeps and peaks at, whole and with its MLP and norms in tiles: counted, byte by byte."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest

from grpo_plus.models.row_wise import row_wise_modules
from grpo_plus.models.tiles import Tiles
from grpo_plus.planner import Run
from tests.planner.configs import LLAMA_3_1_8B, QWEN3_4B
from tests.planner.tracking import Counted, count

LFM2_1_2B = {
    "model_type": "lfm2",
    "hidden_size": 2048,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
    "vocab_size": 65536,
}
RANK, TOKENS, TILE = 16, 512, 64
RUN = Run(
    prompt_length=192,
    max_completion_length=64,
    per_device_train_batch_size=2,
    num_generations=2,
    packing="none",
    lora_r=RANK,
    dtype="bfloat16",
    adapter_dtype="bfloat16",
    gradient_checkpointing=False,
)
# Configuration, kind of its layer, and the norms of a layer: width, and how many there are per token.
MODELS: dict[str, Any] = {
    "Qwen3-4B": (QWEN3_4B, "full_attention", {2560: 2, 128: 32 + 8}),
    "Llama-3.1-8B": (LLAMA_3_1_8B, None, {4096: 2}),
    "LFM2-1.2B": (LFM2_1_2B, "conv", {2048: 2}),
}


@contextmanager
def in_tiles(model: Any) -> Iterator[None]:
    tiles = Tiles(TILE)
    # The numbers of fake tensors cannot be compared.
    tiles._modules[model] = row_wise_modules(model, lambda module: None)
    with tiles.of(model):
        yield


def one_layer(model: str, around: Any, run: Run = RUN) -> Counted:
    config, kind, _ = MODELS[model]
    return count(config | ({"layer_types": [kind]} if kind else {}), run, layers=1, around=around)


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_in_tiles_keeps_inputs_alone(model):
    config, _, norms = MODELS[model]
    # LFM2 makes its MLP two thirds as wide as its configuration says.
    width = config["intermediate_size"] * (2 if model.startswith("LFM2") else 3) // 3
    # Of the MLP: gate, its activation, up, and their product in bfloat16, and what three adapters keep.
    mlp = 2 * (4 * width + 3 * RANK)
    # A norm keeps its input in float32, and a number per row. Its input in bfloat16 is half of that. The model's last
    # norm stands for the layer's first, whose input trains nothing here.
    saved = mlp + sum(number * (2 * wide + 4) for wide, number in norms.items())
    whole, tiled = one_layer(model, nullcontext), one_layer(model, in_tiles)
    assert whole.kept - tiled.kept == TOKENS * saved


def test_the_peak_of_a_checkpointed_layer_is_less_than_half():
    run = replace(RUN, gradient_checkpointing=True)
    whole, tiled = (one_layer("Qwen3-4B", around, run) for around in (nullcontext, in_tiles))
    assert (tiled.peak - tiled.kept) / (whole.peak - whole.kept) == pytest.approx(0.44, abs=0.02)
