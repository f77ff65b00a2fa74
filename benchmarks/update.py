"""What an update costs: forward and backward of GRPO's loss, grpo_plus beside stock TRL, on the same rows.

python -m benchmarks.update [--device cuda|cpu] [--repeats 5] [--shapes 512,256,8 ...] [--variants full ...] [--keep]

Rows are one group of G completions, uniform from 5 % to 100 % of the longest, after a prompt of full length: no gain
from prompts of different lengths is in it. `dead` is five groups, two of them without advantage. Both sides run TRL's
`_compute_loss`, with TRL's head scoring valid positions only, as it does on a GPU. Equality comes first: a gradient
that differs ends the run. Both sides take turns in one process. Peaks are above what was there before, on a CPU in a
process of each side's own. On a CPU: a small Qwen3 in float32, seconds of the process. On a GPU: Qwen3-1.7B's shape in
bfloat16, or Qwen3-4B's with nf4, random weights made on the device, bfloat16 autocast. Variants whose name has
`checkpointing` in it checkpoint their layers. In `vision`, four fifths of the prompt are a picture, and all weights of
a small Qwen2.5-VL train; in `vision-lora`, adapters of its language model. `--keep` keeps the earlier rows that are not
measured again. Writes benchmarks/results/update_<device>.json after each row, or update_vision_<device>.json.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import vision
from benchmarks.machine import RESULTS, describe, device_name, in_a_process, peak_mb, seconds
from benchmarks.memory_run import MODELS, random_model
from grpo_plus.planner import QLORA, Run

SHAPES = ((128, 128, 8), (512, 256, 8), (1024, 128, 8), (2048, 256, 8), (64, 512, 8), (512, 1024, 16))
# By device; TRL checkpoints unless it is told not to.
VARIANTS = {
    "cpu": ("full", "checkpointing", "lora", "nf4"),
    "cuda": ("lora", "lora-checkpointing", "nf4-checkpointing"),
}
VISION = ("vision", "vision-lora")
VISION_SHAPES = ((320, 64, 8),)
CHOICES = ("full", "checkpointing", "lora", "lora-checkpointing", "nf4", "nf4-checkpointing", "dead", *VISION)
CPU_MODEL = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8000,
    "tie_word_embeddings": True,
}
# Relative error of the whole gradient; in bfloat16, padding a row alone changes 1.5e-2.
TOLERANCE = {"cpu": 2e-5, "cuda": 5e-2}


def main() -> None:
    """Check, time and weigh every shape under every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU, for both sides")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="PROMPT,COMPLETION,G")
    parser.add_argument("--variants", nargs="+", choices=CHOICES)
    parser.add_argument("--keep", action="store_true", help="keep rows of the file that are not measured again")
    parser.add_argument("--case", nargs=3, metavar=("SHAPE", "VARIANT", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        shape, variant, side = args.case
        print(json.dumps(measure(_shape(shape), variant, side, args.device, args.repeats)))
        return
    variants = args.variants or VARIANTS[args.device]
    sees = set(variants) <= set(VISION)
    shapes = args.shapes or (VISION_SHAPES if sees else SHAPES)
    cases = [(shape, variant) for shape in shapes for variant in variants]
    if not args.variants:
        cases.append(((512, 256, 8), "dead"))
    path = RESULTS / f"update_{'vision_' if sees else ''}{args.device}.json"
    earlier = json.loads(path.read_text())["rows"] if args.keep and path.exists() else []
    rows = [row for row in earlier if (tuple(row["shape"]), row["variant"]) not in cases]
    for shape, variant in cases:
        rows.append(_row(shape, variant, args) | {"load": round(os.getloadavg()[0], 1)})
        summary = {
            "command": "python -m benchmarks.update " + " ".join(sys.argv[1:]),
            "machine": describe() | {"threads": args.threads, "device": device_name(args.device)},
            "rows": rows,
        }
        path.write_text(json.dumps(summary, indent=1) + "\n")  # after each: a run that is stopped loses nothing
    print(f"written to {path.name}")


def _shape(text: str) -> tuple[int, int, int]:
    prompt, completion, generations = map(int, text.split(","))
    return prompt, completion, generations


def _row(shape: tuple[int, int, int], variant: str, args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda":  # an allocator that counts needs no process of its own
        both = measure(shape, variant, "both", args.device, args.repeats)
    else:
        both = _spawn(shape, variant, "both", args)
        both["peak_mb"] = {side: _spawn(shape, variant, side, args)["peak_mb"][side] for side in ("trl", "plus")}
    medians = {side: statistics.median(times) for side, times in both["seconds"].items()}
    row = both | {
        "shape": shape,
        "variant": variant,
        "speed_up": medians["trl"] / medians["plus"],
        "memory_ratio": both["peak_mb"]["trl"] / max(both["peak_mb"]["plus"], 1e-9),
    }
    print(
        f"{','.join(map(str, shape)):>12} {variant:<14} TRL {medians['trl']:7.2f} s  ours {medians['plus']:6.2f} s  "
        f"{row['speed_up']:5.2f}x  memory {row['memory_ratio']:5.2f}x  tokens {row['token_ratio']:4.1f}x  "
        f"gradients {row['gradient_error']:.0e}",
        flush=True,
    )
    return row


def _spawn(shape: tuple[int, int, int], variant: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--device", args.device, "--repeats", str(args.repeats), "--threads", str(args.threads)]
    return in_a_process(
        "benchmarks.update", [*arguments, "--case", ",".join(map(str, shape)), variant, side], args.threads
    )


def measure(shape: tuple[int, int, int], variant: str, side: str, device: str, repeats: int) -> dict[str, Any]:
    """`side` both: check and time, and on a GPU weigh. "trl" or "plus": the peak of one side alone."""
    batches = batches_of(shape, variant, device)
    with sides(shape, variant, device, ("trl", "plus") if side == "both" else (side,)) as trainers:
        if side != "both":
            return {"peak_mb": {side: _peak(trainers[side], batches, device)}}
        error = gradient_error(trainers, batches, device)
        taken = timed(trainers, batches, device, repeats)
        peaks = (
            {name: _peak(trainer, batches, device) for name, trainer in trainers.items()} if device == "cuda" else {}
        )
    ratios = trainers["plus"]._metrics["train"]["packing/token_ratio"][-len(batches) :]
    return {
        "seconds": taken,
        "peak_mb": peaks,
        "gradient_error": error,
        "token_ratio": len(ratios) / sum(1 / ratio for ratio in ratios),
        "packing": trainers["plus"].speed.packer.describe(),
    }


def batches_of(shape: tuple[int, int, int], variant: str, device: str) -> list[dict[str, Any]]:
    """The micro-batches of an update, one group each."""
    groups = 5 if variant == "dead" else 1
    batches = [rows_of(shape, device, seed, dead=seed in (1, 3) and groups > 1) for seed in range(groups)]
    if variant in VISION:
        batches = [vision.with_a_picture(batch, seed) for seed, batch in enumerate(batches)]
    return batches


@contextmanager
def sides(
    shape: tuple[int, int, int],
    variant: str,
    device: str,
    names: tuple[str, ...] = ("trl", "plus"),
    model: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Trainers as `trainer_of` makes them, with the same weights, inside what surrounds a training."""
    with patch("trl.trainer.utils._use_triton", return_value=True), ExitStack() as training:
        trainers = {name: trainer_of(name, shape, variant, device, model) for name in names}
        if "plus" in trainers:  # as train() does
            training.enter_context(trainers["plus"].speed.around_training(trainers["plus"].model))
        for weights in zip(*map(_trained, trainers.values()), strict=True):
            for weight in weights[1:]:
                weight.data.copy_(weights[0].data)
        yield trainers


def gradient_error(trainers: dict[str, Any], batches: list[dict[str, Any]], device: str) -> float:
    """Relative error of our whole gradient. One that is too large ends the run."""
    gradients = {name: _update(trainer, batches) for name, trainer in trainers.items()}
    error = float((gradients["plus"] - gradients["trl"]).norm() / gradients["trl"].norm())
    if error > TOLERANCE[device]:
        raise SystemExit(f"gradients differ by {error:.1e}")
    return error


def timed(trainers: dict[str, Any], batches: list[dict[str, Any]], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each update. The sides take turns."""
    taken: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(repeats):
        for name, trainer in trainers.items():
            taken[name].append(seconds(partial(run, trainer, batches), device))
    return taken


def rows_of(shape: tuple[int, int, int], device: str, seed: int, *, dead: bool) -> dict[str, Any]:
    """A micro-batch as TRL hands it to its loss: one group, completions of 5 to 100 % of the longest."""
    prompt, completion, generations = shape
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.linspace(0.05, 1.0, generations) * completion).long()
    mask = (torch.arange(completion) < lengths[:, None]).long()
    advantages = torch.randn(generations, generator=generator)
    inputs = {
        "prompt_ids": torch.randint(3, 8000, (1, prompt), generator=generator).repeat(generations, 1),
        "prompt_mask": torch.ones(generations, prompt, dtype=torch.long),
        "completion_ids": torch.randint(3, 8000, (generations, completion), generator=generator) * mask,
        "completion_mask": mask,
        "advantages": torch.zeros_like(advantages) if dead else advantages,
        "num_items_in_batch": mask.sum(),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def trainer_of(
    side: str, shape: tuple[int, int, int], variant: str, device: str, model: dict[str, Any] | None = None
) -> Any:
    """A trainer of one side, "trl" or "plus", that is ready for `run`. None: the device's own model for the variant."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
    from grpo_plus.demo.tiny import tiny_tokenizer

    trainer_class, config_class = (GRPOPlusTrainer, GRPOPlusConfig) if side == "plus" else (GRPOTrainer, GRPOConfig)
    kind, checkpoints = kind_of(variant)
    sees = variant in VISION
    layers = r".*language_model.*_proj" if sees else "all-linear"
    lora = None if kind == "full" else LoraConfig(r=16, target_modules=layers)
    trainer = trainer_class(
        model=vision.model_with_a_tower(device, model) if sees else _model(kind, device, model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config_class(
            tempfile.mkdtemp(),
            per_device_train_batch_size=shape[2],
            num_generations=shape[2],
            max_completion_length=shape[1],
            gradient_checkpointing=checkpoints,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}]),
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
    if checkpoints:  # as train() does; the argument alone does nothing before
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    if device == "cpu":  # TRL makes a quantized model's adapters bfloat16, whose rounding would hide an error
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # at 0 it would leave every lora_A without a gradient to compare
            parameter.data.normal_(std=0.02, generator=generator)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def kind_of(variant: str) -> tuple[str, bool]:
    """What trains, "full", "lora" or "nf4", and whether layers are checkpointed."""
    kind, _, rest = variant.partition("-")
    checkpoints = "checkpointing" in (kind, rest)
    kinds = {"checkpointing": "full", "dead": "lora", "vision": rest or "full"}
    return kinds.get(kind, kind), checkpoints


def _model(kind: str, device: str, config: dict[str, Any] | None) -> Any:
    if config is None:
        config = CPU_MODEL if device == "cpu" else MODELS["Qwen3-4B" if kind == "nf4" else "Qwen3-1.7B"]
    dtype = "float32" if device == "cpu" else "bfloat16"
    torch.manual_seed(0)
    run = Run(**QLORA | {"dtype": dtype}) if kind == "nf4" else Run(dtype=dtype)
    return random_model(config | {"max_position_embeddings": 32768}, run, device)


def _trained(trainer: Any) -> list[torch.Tensor]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def _update(trainer: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    """The gradient of all micro-batches, in one vector."""
    run(trainer, batches)
    return torch.cat([weight.grad.flatten().float() for weight in _trained(trainer)])  # type: ignore[union-attr]


def run(trainer: Any, batches: list[dict[str, Any]]) -> None:
    """Forward and backward of each micro-batch, with what surrounds them in a training."""
    trainer.model.zero_grad()
    for inputs in batches:
        with around_update(trainer):
            loss_of(trainer, inputs).backward()


def around_update(trainer: Any) -> AbstractContextManager[None]:
    """What surrounds forward and backward of a micro-batch on the trainer's side."""
    return trainer.speed.adapters.step() if hasattr(trainer, "speed") else nullcontext()


def loss_of(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The forward of a micro-batch."""
    with trainer.accelerator.autocast():
        return trainer._compute_loss(trainer.model, inputs)  # type: ignore[no-any-return]


def _peak(trainer: Any, batches: list[dict[str, Any]], device: str) -> float:
    """MB above what the process held before its first update, gradients and our self-check included."""
    if device == "cuda":
        _update(trainer, batches)  # without the first launches' workspaces
        trainer.model.zero_grad()
    return peak_mb(partial(run, trainer, batches), device)


if __name__ == "__main__":
    main()
