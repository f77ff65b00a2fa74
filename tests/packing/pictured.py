"""Padded rows whose prompts show pictures, and what each of these rows gives alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer import add_fused_lm_head

from grpo_plus.packing import PaddedRows
from grpo_plus.packing.forward import install_packed_forward
from grpo_plus.trainer.update.pictures import pictures_of
from tests.packing.rows import COMPLETION
from tests.vision import QUESTIONS, SIZES, family, pictures

# Of each prompt its pictures and the lengths of its completions. The second prompt is of text, the last has the tokens
# of the first and another picture.
ONE, OTHER = pictures(SIZES[0], seed=1), pictures(SIZES[0], seed=2)
PROMPTS = (
    (ONE, QUESTIONS[0], (17, 9, 1)),
    ([], QUESTIONS[1], (5, 2)),
    (pictures(SIZES[1], SIZES[2], seed=3), QUESTIONS[2], (4, 12)),
    (OTHER, QUESTIONS[0], (6,)),
)
ORDER = (4, 0, 7, 5, 1, 3, 6, 2)  # of the rows in the batch


@dataclass(frozen=True)
class Pictured:
    """A batch, and its rows one by one.

    rows: with the pictures of all rows.
    alone: of each row, what the processor makes of its prompt, and its completion (c,).
    """

    rows: PaddedRows
    alone: list[tuple[dict[str, Tensor], Tensor]]


def pictured_model(name: str, *, checkpointing: bool = False) -> tuple[PreTrainedModel, Any]:
    """The model in training mode, with TRL's fused head and the packed forward, and its processor."""
    model, processor = family(name)
    add_fused_lm_head(model.train(), temperature=1.3, outputs=("log_probs", "entropy"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    install_packed_forward(model)
    return model, processor


def pictured_batch(model: PreTrainedModel, processor: Any, prompts: Any = PROMPTS, order: Any = ORDER) -> Pictured:
    """Rows of the prompts in an order, padded as TRL pads them."""
    generator = torch.Generator().manual_seed(5)
    rows = [(shown, asked, length) for shown, asked, lengths in prompts for length in lengths]
    rows = [rows[row] for row in order]
    draws = [torch.randint(3, 60, (length,), generator=generator) for _, _, length in rows]
    alone = [
        (_processed(processor, [(shown, asked)]), draw) for (shown, asked, _), draw in zip(rows, draws, strict=True)
    ]
    width = max(inputs["input_ids"].shape[1] for inputs, _ in alone)
    ids = torch.zeros(len(rows), width + COMPLETION, dtype=torch.long)
    mask = torch.zeros_like(ids)
    types = {name: torch.zeros_like(ids) for name in alone[0][0] if name.endswith("token_type_ids")}
    for row, (inputs, completion) in enumerate(alone):
        length = inputs["input_ids"].shape[1]
        ids[row, width - length : width + len(completion)] = torch.cat([inputs["input_ids"][0], completion])
        mask[row, width - length : width + len(completion)] = 1
        for name, by_row in types.items():
            by_row[row, width - length : width] = inputs[name][0]
    with_pictures = [(shown, asked) for shown, asked, _ in rows if shown]
    images = {k: v for k, v in _processed(processor, with_pictures).items() if k not in _TEXT and k not in types}
    shown = _of_all(images, [len(shown) for shown, _, _ in rows], _tiles(processor, rows, images))
    return Pictured(PaddedRows(ids, mask, COMPLETION, pictures=pictures_of(shown | types)), alone)


_TEXT = ("input_ids", "attention_mask")


def _processed(processor: Any, asked: list[tuple[list[Any], str]]) -> dict[str, Tensor]:
    prompts = [
        [{"role": "user", "content": [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]}]
        for shown, text in asked
    ]
    texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    images = [shown for shown, _ in asked] if any(shown for shown, _ in asked) else None
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def _of_all(images: dict[str, Tensor], counts: list[int], tiles: list[int] | None) -> dict[str, Any]:
    """Images of the rows that have some, as TRL has them of all rows. A tensor per row has zeros for the others."""
    if "pixel_attention_mask" in images:
        places = torch.tensor(counts).bool()
        padded = {k: v.new_zeros(len(counts), *v.shape[1:]) for k, v in images.items()}
        for name, value in padded.items():
            value[places] = images[name]
        images = padded
    return images | {"num_images": counts} | ({} if tiles is None else {"num_tiles": tiles})


def _tiles(processor: Any, rows: list[Any], images: dict[str, Tensor]) -> list[int] | None:
    counts = sum(len(shown) for shown, _, _ in rows)
    if images["pixel_values"].dim() != 4 or len(images["pixel_values"]) == counts:
        return None
    return [
        int(processor.image_processor(images=shown, crop_to_patches=True, return_tensors="pt")["num_patches"].sum())
        if shown
        else 0
        for shown, _, _ in rows
    ]


def padded(model: PreTrainedModel) -> Callable[..., Tensor]:
    """A forward of padded rows, as TRL's takes what a row has beside its tokens."""

    def forward(ids: Tensor, mask: Tensor, length: int, /, **shown: Any) -> Tensor:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-length] = -100
        shown = {name: value for name, value in shown.items() if not name.startswith("num_")}
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **shown)
        logps: Tensor = output.log_probs[:, -length:]
        return logps

    return forward


def pictured_alone(model: PreTrainedModel, batch: Pictured) -> Tensor:
    """(B, T) log-probabilities of each row without any padding, through TRL's fused head. 0 at padding."""
    logps = []
    for prompt, completion in batch.alone:
        tokens = torch.cat([prompt["input_ids"][0], completion])[None]
        labels = tokens.clone()
        labels[:, : -len(completion)] = -100
        more = {name: value for name, value in prompt.items() if name not in _TEXT}
        for name in more:
            if name.endswith("token_type_ids"):
                more[name] = torch.nn.functional.pad(more[name], (0, len(completion)))
        output = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels, fused_lm_head=True, **more
        )
        logps.append(
            torch.nn.functional.pad(output.log_probs[0, -len(completion) :], (0, COMPLETION - len(completion)))
        )
    return torch.stack(logps)
