"""What an update costs: forward and backward of GRPO's loss, grpo_plus beside stock TRL, on the same rows.

python -m benchmarks.update [--device cpu] [--repeats 5] [--shapes 512,256,8 ...] [--variants full lora ...]

Rows are one group of G completions, uniform from 5 % to 100 % of the longest, after a prompt of full length: no gain
from prompts of different lengths is in it. `dead` is five groups, two of them without advantage. Both sides run TRL's
`_compute_loss`, with TRL's head scoring valid positions only, as it does on a GPU. Equality comes first: a gradient
that differs ends the run. Both sides take turns in one process; peaks are of one process each, above what it held
before. On a CPU: a small Qwen3 in float32, seconds of the process. On a GPU: Qwen3-1.7B's shape in bfloat16, or
Qwen3-4B's with nf4, random weights. Writes benchmarks/results/update_<device>.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import RESULTS, describe, peak_mb, seconds
from grpo_plus.qlora.lora_layers import fused_lora

SHAPES = ((128, 128, 8), (512, 256, 8), (1024, 128, 8), (2048, 256, 8), (64, 512, 8), (512, 1024, 16))
VARIANTS = ("full", "checkpointing", "lora", "nf4")
DEAD = ("dead",)
CPU_SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8000}
CPU_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
QWEN3_1_7B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 151936}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
HEADS = {
    "qwen3-1.7b": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "qwen3-4b": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}
# Relative error of the whole gradient; in bfloat16, padding a row alone changes 1.5e-2.
TOLERANCE = {"cpu": 2e-5, "cuda": 5e-2}


def main() -> None:
    """Check, time and weigh every shape under every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU, for both sides")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="PROMPT,COMPLETION,G")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS + DEAD, default=VARIANTS)
    parser.add_argument("--case", nargs=3, metavar=("SHAPE", "VARIANT", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        shape, variant, side = args.case
        print(json.dumps(_case(_shape(shape), variant, side, args.device, args.repeats)))
        return
    cases = [(shape, variant) for shape in args.shapes for variant in args.variants]
    if args.variants == VARIANTS:
        cases.append(((512, 256, 8), "dead"))
    path = RESULTS / f"update_{args.device}.json"
    rows: list[dict[str, Any]] = []
    for shape, variant in cases:
        rows.append(_row(shape, variant, args) | {"load": round(os.getloadavg()[0], 1)})
        summary = {
            "command": "python -m benchmarks.update " + " ".join(sys.argv[1:]),
            "machine": describe() | {"threads": args.threads, "device": _name(args)},
            "rows": rows,
        }
        path.write_text(json.dumps(summary, indent=1) + "\n")  # after each: a run that is stopped loses nothing
    print(f"written to {path}")


def _shape(text: str) -> tuple[int, int, int]:
    prompt, completion, generations = map(int, text.split(","))
    return prompt, completion, generations


def _name(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if args.device == "cuda" else "cpu"


def _row(shape: tuple[int, int, int], variant: str, args: argparse.Namespace) -> dict[str, Any]:
    cases = {side: _spawn(shape, variant, side, args) for side in ("both", "trl", "plus")}
    times = cases["both"]["seconds"]
    medians = {side: statistics.median(times[side]) for side in times}
    row = {
        "shape": shape,
        "variant": variant,
        "seconds": times,
        "speed_up": medians["trl"] / medians["plus"],
        "peak_mb": {side: cases[side]["peak_mb"] for side in ("trl", "plus")},
        "memory_ratio": cases["trl"]["peak_mb"] / max(cases["plus"]["peak_mb"], 1e-9),
        "gradient_error": cases["both"]["gradient_error"],
        "token_ratio": cases["both"]["token_ratio"],
        "packing": cases["both"]["packing"],
    }
    print(
        f"{','.join(map(str, shape)):>12} {variant:<14} TRL {medians['trl']:7.2f} s  ours {medians['plus']:6.2f} s  "
        f"{row['speed_up']:5.2f}x  memory {row['memory_ratio']:5.2f}x  tokens {row['token_ratio']:4.1f}x  "
        f"gradients {row['gradient_error']:.0e}",
        flush=True,
    )
    return row


def _spawn(shape: tuple[int, int, int], variant: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.update", "--device", args.device, "--repeats", str(args.repeats)]
    command += ["--threads", str(args.threads), "--case", ",".join(map(str, shape)), variant, side]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{shape} {variant} {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _case(shape: tuple[int, int, int], variant: str, side: str, device: str, repeats: int) -> dict[str, Any]:
    """`side` both: check and time; otherwise the peak of one side alone."""
    groups = 5 if variant == "dead" else 1
    batches = [_rows(shape, device, seed, dead=seed in (1, 3) and groups > 1) for seed in range(groups)]
    with patch("trl.trainer.utils._use_triton", return_value=True), ExitStack() as training:
        sides = ("trl", "plus") if side == "both" else (side,)
        trainers = {name: _trainer(name, shape, variant, device) for name in sides}
        if "plus" in trainers and trainers["plus"].speed.fuses_lora:  # as train() does
            training.enter_context(fused_lora(trainers["plus"].model))
        if side != "both":
            return {"peak_mb": _peak(trainers[side], batches, device)}
        gradients = {name: _update(trainer, batches) for name, trainer in trainers.items()}
        error = float((gradients["plus"] - gradients["trl"]).norm() / gradients["trl"].norm())
        if error > TOLERANCE[device]:
            raise SystemExit(f"gradients differ by {error:.1e}")
        taken: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(repeats):
            for name, trainer in trainers.items():
                taken[name].append(seconds(partial(_run, trainer, batches), device))
    ratios = trainers["plus"]._metrics["train"]["packing/token_ratio"][-groups:]
    return {
        "seconds": taken,
        "gradient_error": error,
        "token_ratio": len(ratios) / sum(1 / ratio for ratio in ratios),
        "packing": trainers["plus"].speed.packer.describe(),
    }


def _rows(shape: tuple[int, int, int], device: str, seed: int, *, dead: bool) -> dict[str, Any]:
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


def _trainer(side: str, shape: tuple[int, int, int], variant: str, device: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
    from grpo_plus.demo.tiny import tiny_tokenizer

    trainer_class, config_class = (GRPOPlusTrainer, GRPOPlusConfig) if side == "plus" else (GRPOTrainer, GRPOConfig)
    lora = LoraConfig(r=16, target_modules="all-linear") if variant in ("lora", "nf4", "dead") else None
    trainer = trainer_class(
        model=_model(variant, device),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config_class(
            tempfile.mkdtemp(),
            per_device_train_batch_size=shape[2],
            num_generations=shape[2],
            max_completion_length=shape[1],
            gradient_checkpointing=variant == "checkpointing",
            bf16=False,
            use_cpu=device == "cpu",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}]),
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
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


def _model(variant: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config

    shape, heads = (CPU_SHAPE, CPU_HEADS)
    if device == "cuda":
        shape, heads = (QWEN3_4B, HEADS["qwen3-4b"]) if variant == "nf4" else (QWEN3_1_7B, HEADS["qwen3-1.7b"])
    config = Qwen3Config(**shape, **heads, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if variant != "nf4":
        return model
    with tempfile.TemporaryDirectory() as folder:  # bitsandbytes quantizes while it loads
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype)


def _update(trainer: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    """The gradient of all micro-batches, in one vector."""
    _run(trainer, batches)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]).float()


def _run(trainer: Any, batches: list[dict[str, Any]]) -> None:
    trainer.model.zero_grad()
    for inputs in batches:
        trainer._compute_loss(trainer.model, inputs).backward()


def _peak(trainer: Any, batches: list[dict[str, Any]], device: str) -> float:
    """MB above what the process held before its first update, gradients and our self-check included."""
    if device == "cuda":
        _update(trainer, batches)  # without the first launches' workspaces
        trainer.model.zero_grad()
    return peak_mb(partial(_run, trainer, batches), device)


if __name__ == "__main__":
    main()
