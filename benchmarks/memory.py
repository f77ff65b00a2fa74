"""Predicted against measured memory of GRPO steps: random weights of real shapes, one process per run.

python -m benchmarks.memory [--models Qwen3-4B ...] [--cap 12GB] [--calibrate FILE]      on a GPU
python -m benchmarks.memory --tiny                                                      on a CPU, to see that it runs

Each run takes two optimizer steps with prompts and completions of full length, so that the second generates beside the
optimizer's state. On a GPU the measured peaks are what torch allocated (StepProfile), and the prediction leaves out
context and fragmentation, which are measured beside them: --calibrate writes those two for `grpo-plus plan`. --cap lets
torch have only so much of the card, and says who was right about what fits. Prints a table and writes
benchmarks/results/memory.json. On a CPU it prints resident memory, which is no figure for a GPU, and writes nothing:
there TRL's head scores every position, prompts included, and its tiles are several.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import RESULTS, describe
from grpo_plus.planner import QLORA, Constants, MemoryPlan, Run, parse_bytes, plan, shape_of
from grpo_plus.planner.constants import GIB
from grpo_plus.planner.memory import weight_bytes

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": QWEN3
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen3-4B": QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
}
TINY = QWEN3 | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 4096,
}
COMPLETION = {"prompt_length": 256, "max_completion_length": 512}
RUNS = {
    "recipe": Run(**QLORA, **COMPLETION),
    "recipe, padded rows": Run(**QLORA, **COMPLETION, packing="none"),
    "recipe, 4 x 8 rows, reference": Run(**QLORA, **COMPLETION, gradient_accumulation_steps=4, beta=0.04),
    "TRL's defaults in nf4": Run(**COMPLETION, packing="none", load_in_4bit=True, lora_r=16, adapter_dtype="bfloat16"),
    "LoRA in bf16": Run(**COMPLETION, dtype="bfloat16", lora_r=16),
}
TINY_RUNS = {
    "LoRA": Run(prompt_length=96, max_completion_length=16, dtype="float32", lora_r=8, bf16=False, packing="none"),
}
EXACT = Constants(context_bytes=0, fragmentation=1)  # what torch allocates


def main() -> None:
    """Run every case in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--cap", help="memory that torch may have, for example 12GB")
    parser.add_argument("--calibrate", metavar="FILE", help="write the measured constants")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        config, settings, cap, device = json.loads(args.case)
        print(json.dumps(measure(config, Run(**settings), cap, device)))
        return
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. --tiny runs on the CPU")
    configs = {"tiny": TINY} if args.tiny else {name: MODELS[name] for name in args.models}
    runs, device = (TINY_RUNS, "cpu") if args.tiny else (RUNS, "cuda")
    cap = parse_bytes(args.cap) if args.cap else None
    print(f"{'model':<13} {'run':<30} {'phase':<10} {'predicted':>9} {'measured':>9} {'error':>7}   (GiB)")
    rows = [
        row for model in configs for run in runs for row in compare(model, configs[model], run, runs[run], cap, device)
    ]
    if device == "cuda":
        report(rows, args.calibrate, " ".join(sys.argv[1:]))


def compare(
    model: str, config: dict[str, Any], name: str, run: Run, cap: int | None, device: str
) -> list[dict[str, Any]]:
    """Rows of the table for one run."""
    planned = plan(shape_of(config), run, constants=EXACT)
    measured = in_a_fresh_process(config, run, cap, device)
    about = {"model": model, "run": name, "settings": asdict(run), "cap": cap}
    if "error" in measured:
        fits = "" if cap is None else f"; the plan says it {'fits' if _fits(planned, cap) else 'does not fit'}"
        print(f"{model:<13} {name:<30} {measured['error']}{fits}", flush=True)
        return [about | measured | {"predicted_gib": round(planned.peak / GIB, 3)}]
    rows = []
    for phase, peak in measured["peaks"].items():
        predicted = planned.phase(phase) if phase != "load" else weight_bytes(planned.shape, run)
        row = about | {
            "phase": phase,
            "predicted_gib": round(predicted / GIB, 3),
            "measured_gib": round(peak / GIB, 3),
            "error": round(predicted / peak - 1, 3),
        }
        figures = f"{row['predicted_gib']:>9.2f} {row['measured_gib']:>9.2f} {row['error']:>7.1%}"
        print(f"{model:<13} {name:<30} {phase:<10} {figures}", flush=True)
        rows.append(row | {key: measured[key] for key in ("context_bytes", "reserved_bytes", "static_bytes")})
    return rows


def _fits(planned: MemoryPlan, cap: int) -> bool:
    """Of what torch may have: the context and the driver's part are not in it."""
    full = plan(planned.shape, planned.run)
    return full.peak - full.constants.context_bytes <= cap


def report(rows: list[dict[str, Any]], calibrate: str | None, arguments: str) -> None:
    """Write the result file, and the constants where they are wanted."""
    complete = [row for row in rows if "phase" in row]
    summary = {
        "command": f"python -m benchmarks.memory {arguments}".strip(),
        "machine": describe() | {"gpu": torch.cuda.get_device_name()},
        "peaks_within_10_percent": _within(complete, 0.1),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(summary, indent=2) + "\n")
    if calibrate and complete:
        Path(calibrate).write_text(json.dumps(constants_from(complete), indent=2) + "\n")


def _within(rows: list[dict[str, Any]], tolerance: float) -> str:
    """How many runs' largest phase was predicted within the tolerance."""
    runs = {(row["model"], row["run"]): [] for row in rows}
    for row in rows:
        runs[row["model"], row["run"]].append(row)
    right = [max(r["predicted_gib"] for r in run) / max(r["measured_gib"] for r in run) - 1 for run in runs.values()]
    return f"{sum(abs(error) <= tolerance for error in right)} of {len(right)}"


def constants_from(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Context, and what the allocator reserved beyond what was allocated, of the run where it was most."""
    peaks: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["model"], row["run"]
        peaks[key] = max(peaks.get(key, 0), row["measured_gib"] * GIB)
    fragmentation = max(
        (row["reserved_bytes"] - row["static_bytes"]) / max(peaks[row["model"], row["run"]] - row["static_bytes"], 1)
        for row in rows
    )
    return {"context_bytes": max(row["context_bytes"] for row in rows), "fragmentation": max(1.0, fragmentation)}


def in_a_fresh_process(config: dict[str, Any], run: Run, cap: int | None, device: str) -> dict[str, Any]:
    """`measure` where nothing was allocated before; a run that dies is an error and not the end."""
    case = json.dumps([config, asdict(run), cap, device])
    # Else the C library keeps what a phase freed, and on a CPU the next phase would seem to need it.
    returning = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"} if device == "cpu" else {}
    command = [sys.executable, "-m", "benchmarks.memory", "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | returning)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": "out of memory" if "OutOfMemoryError" in last else last[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: dict[str, Any], run: Run, cap: int | None, device: str) -> dict[str, Any]:
    """Peaks of the phases of two optimizer steps, in bytes."""
    from grpo_plus import StepProfile

    with tempfile.TemporaryDirectory() as folder:  # what is imported and set up on first use
        small = config | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
        short = replace(run, prompt_length=8, max_completion_length=8, load_in_4bit=False)
        make_trainer(folder, random_model(small, short, device), short, device).train()
    before = _in_use(device)
    model = random_model(config, run, device)
    static = _in_use(device) - before
    if cap is not None:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, model, run, device)
        trainer.add_callback(StepProfile(trainer))
        trainer.train()
        last = [entry for entry in trainer.state.log_history if "profile/update_peak_gb" in entry][-1]
    phases = ("generate", "score", "update", "optimizer")
    peaks = {name: round(last[f"profile/{name}_peak_gb"] * 1e9) for name in phases if run.scores or name != "score"}
    reserved = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    context = 0
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()  # others on the card count, too: have it alone
    offset = before if device == "cpu" else 0  # resident memory holds the program, too
    return {
        "peaks": {"load": static} | {name: peak - offset for name, peak in peaks.items()},
        "context_bytes": context,
        "reserved_bytes": reserved,
        "static_bytes": static,
    }


def _in_use(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def random_model(config: dict[str, Any], run: Run, device: str) -> Any:
    """A model with random weights on the device; its linear layers in nf4 where the run asks for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, run.dtype))
    if run.load_in_4bit:
        head = model.get_output_embeddings()
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear and child is not head:
                    setattr(parent, name, _quantized(child, run))
        model.is_loaded_in_4bit = True
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def _quantized(linear: nn.Linear, run: Run) -> nn.Module:
    import bitsandbytes

    quantized = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=run.use_bnb_nested_quant,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().cpu(),
        requires_grad=False,
        compress_statistics=run.use_bnb_nested_quant,
        quant_type="nf4",
        module=quantized,
    ).to(linear.weight.device)
    if linear.bias is not None:
        quantized.bias = linear.bias
    return quantized


def make_trainer(folder: str, model: Any, run: Run, device: str) -> Any:
    """A trainer of two steps whose completions have their full length."""
    from datasets import Dataset
    from peft import LoraConfig

    from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
    from grpo_plus.demo.tiny import tiny_tokenizer

    prompts = Dataset.from_list([{"prompt": f"{index:>{run.prompt_length}}"} for index in range(64)])
    settings = asdict(replace(run, generation_chunk_size=None))
    theirs = (
        "max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
        "num_generations", "num_iterations", "beta", "gradient_checkpointing", "packing", "optim", "bf16",
    )  # fmt: skip
    config = GRPOPlusConfig(
        folder,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=device == "cpu",
        generation_kwargs={"min_new_tokens": run.max_completion_length},
        **{name: settings[name] for name in theirs},
    )
    adapters = LoraConfig(r=run.lora_r, target_modules="all-linear", lora_dropout=run.lora_dropout)
    trainer = GRPOPlusTrainer(
        model=model,
        reward_funcs=_some_reward,
        args=config,
        train_dataset=prompts,
        processing_class=tiny_tokenizer(),
        peft_config=adapters if run.lora_r else None,
    )
    if run.lora_r:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32 if run.adapter_size == 4 else torch.bfloat16)
    return trainer


def _some_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """No two completions alike, so that every group trains."""
    return [sum(ids) % 1009 + index / 7 for index, ids in enumerate(completion_ids)]


if __name__ == "__main__":
    main()
