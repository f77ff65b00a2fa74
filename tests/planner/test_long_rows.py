"""The update of one long row, with and without the switches for it, against a count of what is allocated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from grpo_plus.models import tiles
from grpo_plus.models.offload import Offload
from grpo_plus.models.tiles import Tiles
from grpo_plus.planner import Constants, Run, shape_of
from grpo_plus.planner.changes import leanest
from grpo_plus.planner.update import host_inputs, update_bytes
from tests.planner.configs import LLAMA_3_1_8B, QWEN3_4B
from tests.planner.tracking import count

LAYERS, TOKENS, TILE = 4, 2048, 256
ROW: dict[str, Any] = {
    "packing": "padding_free",
    "dtype": "bfloat16",
    "lora_r": 16,
    "adapter_dtype": "bfloat16",
    "prompt_length": 24,
    "max_completion_length": TOKENS - 24,
    "per_device_train_batch_size": 1,
    "num_generations": 1,
}


@contextmanager
def switched(model: nn.Module) -> Iterator[None]:
    with Tiles(TILE).of(model), Offload().of(model):
        yield


@pytest.mark.parametrize("config", [QWEN3_4B, LLAMA_3_1_8B], ids=["Qwen3-4B", "Llama-3.1-8B"])
def test_a_long_row_with_tiles_and_inputs_on_the_host_peaks_where_allocations_do(config, monkeypatch):
    # Tensors without data cannot be compared. `tests/models/test_tiles.py` holds that modules are the same in tiles.
    monkeypatch.setattr(tiles, "why_not_tiled", lambda module: None)
    run = Run(**ROW, mlp_tile_tokens=TILE, offload_activations=True)
    shape = shape_of(config | {"num_hidden_layers": LAYERS, "vocab_size": 128})
    predicted = sum(update_bytes(shape, run, Constants()).values())
    # Segment attention, which a CPU has, copies its output once more than flash attention does.
    copied = 2 * TOKENS * shape.layers[0].query
    counted = count(config, run, layers=LAYERS, around=switched).peak - host_inputs(shape, run)
    assert predicted + copied == pytest.approx(counted, rel=0.1)


def test_a_long_row_without_them_peaks_where_allocations_do():
    run = Run(**ROW, mlp_tile_tokens=None)
    shape = shape_of(QWEN3_4B | {"num_hidden_layers": LAYERS, "vocab_size": 128})
    predicted = sum(update_bytes(shape, run, Constants()).values())
    copied = 2 * TOKENS * shape.layers[0].query
    assert predicted + copied == pytest.approx(count(QWEN3_4B, run, layers=LAYERS).peak, rel=0.1)


def test_the_host_holds_the_inputs_of_all_passes_and_advice_asks_for_one_row_at_a_time():
    shape = shape_of(QWEN3_4B)
    run = Run(**ROW | {"per_device_train_batch_size": 8, "num_generations": 8}, offload_activations=True)
    one = replace(run, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert host_inputs(shape, one) == 36 * TOKENS * 2560 * 2
    assert host_inputs(shape, run) == 8 * host_inputs(shape, one)
    assert leanest(replace(run, offload_activations=False)).per_device_train_batch_size == 1
