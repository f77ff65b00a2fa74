"""Generation with each prompt once and rows that leave, beside transformers' own loop, token by token the same.

python -m benchmarks.generation [--device cuda|cpu] [--pairs 5] [--images]

Qwen3-shaped models with random weights, float32 on a CPU and bfloat16 on a GPU, sampling at temperature 1. With
`--images`, Qwen2.5-VL-shaped ones, and an image in each prompt. Rows end
with the same probability at every token, 45 % of the longest on average before the cut, unless the case says that all
are as long. The tokens are compared first, in float32: other tokens end the run. Then both loops take turns; a ratio is
the median over pairs. On a CPU: seconds of the process, one thread. Bytes are those of tensors alive at once, counted
one by one (on a GPU: the allocator's), above what was there before. Writes benchmarks/results/generation_<device>.json,
with images generation_images_<device>.json.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3Config,
)

from benchmarks.lengths import FixedLengths, geometric
from benchmarks.machine import RESULTS, describe, device_name, peak_mb, seconds
from grpo_plus.models.pictures import Pictures
from grpo_plus.rollout import Rollouts
from tests.planner.tracking import Allocations

VOCABULARY, EOS, PAD = 8000, 2, 0
IMAGE = 3  # the token that stands for four patches
PATCH = 14
# Beside a language model of size "m", as large as Qwen2.5-VL-3B's tower is beside its own.
TOWER = {
    "depth": 6,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_heads": 4,
    "patch_size": PATCH,
    "fullatt_block_indexes": [2, 5],
}
SIZES = {
    "m": {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64},
    "s": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
}


@dataclass(frozen=True)
class Case:
    """Rows of one batch.

    Attributes:
        note: what is special. "" for nothing.
        equal: whether all rows have the greatest length.
        image: width and height of each prompt's image in patches, which the prompt's tokens count. 0 without images.
    """

    prompt: int
    longest: int
    groups: int
    generations: int
    size: str
    note: str = ""
    equal: bool = False
    image: int = 0

    @property
    def words(self) -> str:
        """Shape in a few words."""
        note = f", {self.note}" if self.note else ""
        return f"{self.prompt}, {self.longest}, {self.groups} x {self.generations}{note}"


CASES = (
    Case(1024, 48, 1, 8, "m"),
    Case(256, 48, 2, 8, "m"),
    Case(512, 160, 1, 8, "s"),
    Case(64, 256, 1, 8, "s"),
    Case(256, 48, 8, 1, "s", "nothing shared"),
    Case(32, 48, 4, 2, "s", "equal lengths", equal=True),
    Case(32, 48, 8, 1, "s", "nothing shared, equal lengths", equal=True),
)
IMAGE_CASES = (Case(320, 64, 4, 8, "m", "256 of an image", image=32),)


def main() -> None:
    """Compare the tokens, then time and weigh every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", action="store_true", help="prompts with images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in IMAGE_CASES if args.images else CASES:
        rows.append(_measured(case, args.device, args.pairs))
        print(
            f"{case.words:<48} TRL {rows[-1]['seconds']['trl']:6.2f} s  ours {rows[-1]['seconds']['grouped']:6.2f} s  "
            f"{rows[-1]['speed_up']:.2f}x ({rows[-1]['slowest']:.2f} to {rows[-1]['fastest']:.2f})  "
            f"{rows[-1]['peak_mb']['trl']:.0f} and {rows[-1]['peak_mb']['grouped']:.0f} MB",
            flush=True,
        )
    machine = describe() | {"device": device_name(args.device), "threads": 1, "load": round(os.getloadavg()[0], 1)}
    command = f"python -m benchmarks.generation --device {args.device} --pairs {args.pairs}{' --images' * args.images}"
    path = RESULTS / f"generation_{'images_' * args.images}{args.device}.json"
    path.write_text(json.dumps({"command": command, "machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"written to {path.name}")


def _measured(case: Case, device: str, pairs: int) -> dict[str, Any]:
    model = (_seeing_model(case.size) if case.image else small_model(case.size)).to(device)
    loops = {"trl": Batch(case, model, None), "grouped": Batch(case, model, Rollouts(insists=True))}
    drawn = {name: batch.generate(seed=0) for name, batch in loops.items()}  # in float32, also on a GPU
    if not torch.equal(*drawn.values()):
        raise SystemExit(f"{case.words}: other tokens than transformers' own loop")
    if device == "cuda":
        model.to(torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for pair in range(pairs):
        for name, batch in loops.items():
            times[name].append(seconds(lambda batch=batch, pair=pair: batch.generate(seed=pair), device))
    peaks = {name: _peak_mb(batch, device) for name, batch in loops.items()}
    ratios = [trl / ours for trl, ours in zip(times["trl"], times["grouped"], strict=True)]
    return {
        "case": case.words,
        "model": case.size,
        "speed_up": statistics.median(ratios),
        "slowest": min(ratios),
        "fastest": max(ratios),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "peak_mb": peaks,
    }


def _peak_mb(batch: "Batch", device: str) -> float:
    if device == "cuda":
        return peak_mb(lambda: batch.generate(seed=0), device)
    counted = Allocations([*batch.model.parameters(), *batch.model.buffers()])
    with counted:
        batch.generate(seed=0)
    return counted.peak / 2**20


class Batch:
    """One batch of prompts, generated by one of the loops."""

    def __init__(self, case: Case, model: PreTrainedModel, rollouts: Rollouts | None) -> None:
        self.case, self.model, self.rollouts = case, model, rollouts
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(5, VOCABULARY, (case.groups, case.prompt), generator=generator)
        self.images: dict[str, Tensor] = {}
        if case.image:
            prompts[:, 8 : 8 + case.image**2 // 4] = IMAGE
            pixels = torch.randn(case.groups, case.image**2, 6 * PATCH**2, generator=generator)
            rows = case.groups * case.generations
            self.images = {
                "pixel_values": pixels.repeat_interleave(case.generations, 0).flatten(0, 1).to(model.device),
                "image_grid_thw": torch.tensor([[1, case.image, case.image]] * rows, device=model.device),
                "mm_token_type_ids": (prompts == IMAGE).int().repeat_interleave(case.generations, 0).to(model.device),
            }
        self.ids = prompts.repeat_interleave(case.generations, 0).to(model.device)

    def by_row(self, images: Mapping[str, Tensor]) -> Pictures:
        """The images of each row."""
        return Pictures.of({name: list(value.chunk(len(self.ids))) for name, value in images.items()})

    def generate(self, *, seed: int) -> Tensor:
        """Ids of prompts and completions. The same seed gives the same lengths."""
        case, generator = self.case, torch.Generator().manual_seed(seed)
        rows = len(self.ids)
        lengths = torch.full((rows,), case.longest) if case.equal else geometric(rows, case.longest, generator)
        config = GenerationConfig(
            max_new_tokens=case.longest,
            min_new_tokens=case.longest if case.equal else None,
            do_sample=True,
            top_k=0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            disable_compile=True,
        )
        processors = LogitsProcessorList([] if case.equal else [FixedLengths([lengths], EOS)])
        torch.manual_seed(seed)
        rollouts = self.rollouts
        decoding = rollouts.decoding(self.model) if rollouts else nullcontext()
        with torch.no_grad(), decoding, rollouts.seeing(self.by_row) if rollouts else nullcontext():
            return self.model.generate(
                input_ids=self.ids,
                attention_mask=torch.ones_like(self.ids),
                **self.images,
                generation_config=config,
                logits_processor=processors,
            )


def small_model(size: str) -> PreTrainedModel:
    """A Qwen3-shaped model with random weights, of a size in `SIZES`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        num_hidden_layers=6,
        intermediate_size=3 * SIZES[size]["hidden_size"],
        max_position_embeddings=4096,
        **SIZES[size],
    )
    return AutoModelForCausalLM.from_config(config).eval()


def _seeing_model(size: str) -> PreTrainedModel:
    torch.manual_seed(0)
    hidden, eighth = SIZES[size]["hidden_size"], SIZES[size]["head_dim"] // 16
    text = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 6,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth],
        },
        **SIZES[size],
    }
    text |= {"bos_token_id": 1, "eos_token_id": EOS}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=TOWER | {"out_hidden_size": hidden}, image_token_id=IMAGE)
    return AutoModelForImageTextToText.from_config(config).eval()


if __name__ == "__main__":
    main()
