"""A small Qwen2.5-VL, and rows of one prompt with one picture, for the benchmark of updates."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory_run import random_model
from grpo_plus.planner import Run

IMAGE = 1  # the token that stands for a part of a picture; tokens of text are drawn from 3 on
PATCH, MERGED = 14, 2  # pixels of a patch, and patches of a token, in one direction
# The language model is that of the benchmark's other variants. A prompt of four fifths picture costs the tower two
# thirds of what it costs the language model, as with Qwen2.5-VL-3B: 0.67 billion weights see four patches per token.
MODEL: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "image_token_id": IMAGE,
    "bos_token_id": None,
    "eos_token_id": None,
    "video_token_id": 2,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8000,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 256,
        "patch_size": PATCH,
        "spatial_merge_size": MERGED,
        "fullatt_block_indexes": [3],
    },
}


def model_with_a_tower(device: str, config: dict[str, Any] | None = None) -> Any:
    """The model with random weights."""
    from transformers import AutoModelForImageTextToText

    dtype = "float32" if device == "cpu" else "bfloat16"
    torch.manual_seed(0)
    return random_model(config or MODEL, Run(dtype=dtype), device, AutoModelForImageTextToText)


def with_a_picture(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """TRL's micro-batch of one group, with a square picture in the middle of its prompt."""
    rows, prompt = inputs["prompt_ids"].shape
    side = isqrt(prompt * 4 // 5)
    start = (prompt - side**2) // 2
    place = slice(start, start + side**2)
    inputs["prompt_ids"][:, place] = IMAGE
    types = torch.zeros(rows, prompt + inputs["completion_ids"].shape[1], dtype=torch.long)
    types[:, place] = 1
    grid = torch.tensor([[1, side * MERGED, side * MERGED]])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(seed))
    shown: dict[str, Tensor] = {
        "pixel_values": pixels.repeat(rows, 1),
        "image_grid_thw": grid.repeat(rows, 1),
        "mm_token_type_ids": types,
    }
    device = inputs["prompt_ids"].device
    return inputs | {name: tensor.to(device) for name, tensor in shown.items()} | {"num_images": [1] * rows}
