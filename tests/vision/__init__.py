"""Tiny vision-language models with their processors, pictures, and datasets of pictures: all in memory.

`family(name)` gives a model and its processor; `pictured(...)` a dataset; `make_vision_trainer(...)` a trainer of both.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel
from trl import GRPOTrainer

from tests.training import make_trainer
from tests.vision.families import FAMILIES
from tests.vision.models import family

__all__ = ["FAMILIES", "SIZES", "family", "make_vision_trainer", "pictured", "pictures"]

# Widths and heights: wide, tall, square, small and large, so that no two pictures of a prompt have equally many tokens.
SIZES = ((24, 16), (16, 40), (32, 32), (8, 24), (48, 24), (40, 16))
QUESTIONS = ("How many?", "What color is it?", "Is it large?")


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Pictures of noise of the given widths and heights: other seeds give other pictures."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def pictured(counts: Sequence[int] = (1, 1, 1, 1), *, equal: bool = False, column: str | None = None) -> Dataset:
    """A conversational row for each count, with that many pictures in the column `images`, and a column `answer`.

    Two rows each ask the same: where their pictures become equally many tokens, only the pictures tell them apart.

    Args:
        equal: all pictures have the size of the first.
        column: "image" for datasets of one picture a row. None: "images"; no such column where all counts are 0.
    """
    rows: list[dict[str, Any]] = []
    for row, count in enumerate(counts):
        sizes = [SIZES[0 if equal else (row + 2 * k) % len(SIZES)] for k in range(count)]
        shown = pictures(*sizes, seed=row)
        asked: dict[str, Any] = {"prompt": [{"role": "user", "content": QUESTIONS[row // 2 % len(QUESTIONS)]}]}
        if any(counts):
            asked |= {"image": shown[0]} if column == "image" else {"images": shown}
        rows.append(asked | {"answer": str(row)})
    return Dataset.from_list(rows)


def said(completions: list[Any]) -> list[str]:
    return [completion[0]["content"] for completion in completions]


def vowels(completions: list[Any], **_: Any) -> list[float]:
    """A dense reward, so that no two completions of an untrained model tie for long."""
    return [
        0.7 * sum(letter in "aeiou" for letter in text) - 0.01 * sum(map(ord, text)) % 1 for text in said(completions)
    ]


def make_vision_trainer(
    output_dir: Path,
    name: str,
    *,
    prepare: Callable[[PreTrainedModel], None] | None = None,
    **config: Any,
) -> GRPOTrainer:
    """As `make_trainer`, with the model and the processor of a family.

    Args:
        prepare: called with the model before the trainer is built.
    """
    model, processor = family(name)
    if prepare is not None:
        prepare(model)
    defaults: dict[str, Any] = {"reward_funcs": [vowels], "train_dataset": pictured()}
    return make_trainer(output_dir, model=model, processing_class=processor, **(defaults | config))
