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
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe
from benchmarks.memory_run import MODELS, TINY, TRL_DEFAULT, TRL_TUNED, Case, in_a_fresh_process
from grpo_plus.planner import QLORA, Constants, MemoryPlan, Run, parse_bytes, plan, shape_of
from grpo_plus.planner.constants import GIB
from grpo_plus.planner.memory import weight_bytes

COMPLETION = {"prompt_length": 256, "max_completion_length": 512}
WHOLE = {"max_tokens_per_pass": None}  # a card with room takes one pass
PADDED = WHOLE | {"packing": "none", "mlp_tile_tokens": None}
# Settings, and whether TRL's own trainer runs them.
RUNS = {
    "recipe": (Run(**QLORA, **COMPLETION, **WHOLE), False),
    "recipe, padded rows": (Run(**QLORA, **COMPLETION, **PADDED), False),
    "recipe, 4 x 8 rows, reference": (
        Run(**QLORA, **COMPLETION, **WHOLE, gradient_accumulation_steps=4, beta=0.04),
        False,
    ),
    "TRL's defaults in nf4": (Run(**TRL_DEFAULT, **COMPLETION), True),
    "TRL, tuned": (Run(**TRL_TUNED, **COMPLETION), True),
    "LoRA in bf16": (Run(**COMPLETION, **WHOLE, dtype="bfloat16", lora_r=16), False),
}
TINY_LENGTHS = {"prompt_length": 96, "max_completion_length": 16}
TINY_RUNS = {"LoRA": (Run(**TINY_LENGTHS, **PADDED, dtype="float32", lora_r=8, bf16=False), False)}
EXACT = Constants(context_bytes=0, fragmentation=1)  # what torch allocates


def main() -> None:
    """Run every case in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--cap", help="memory that torch may have, for example 12GB")
    parser.add_argument("--calibrate", metavar="FILE", help="write the measured constants")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. --tiny runs on the CPU")
    configs = {"tiny": TINY} if args.tiny else {name: MODELS[name] for name in args.models}
    runs, device = (TINY_RUNS, "cpu") if args.tiny else (RUNS, "cuda")
    cap = parse_bytes(args.cap) if args.cap else None
    print(f"{'model':<13} {'run':<30} {'phase':<10} {'predicted':>9} {'measured':>9} {'error':>7}   (GiB)")
    cases = [
        (model, name, Case(config, run, device, cap, stock))
        for model, config in configs.items()
        for name, (run, stock) in runs.items()
    ]
    rows = [row for model, name, case in cases for row in compare(model, name, case)]
    if device == "cuda":
        report(rows, args.calibrate, " ".join(sys.argv[1:]))


def compare(model: str, name: str, case: Case) -> list[dict[str, Any]]:
    """Rows of the table for one run."""
    run, cap = case.run, case.cap
    planned = plan(shape_of(case.config), run, constants=EXACT)
    measured = in_a_fresh_process(case)
    about = {"model": model, "run": name, "settings": asdict(run), "stock": case.stock, "cap": cap}
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
        "peaks_within_10_percent": within(complete, 0.1),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(summary, indent=2) + "\n")
    if calibrate and complete:
        Path(calibrate).write_text(json.dumps(constants_from(complete), indent=2) + "\n")


def within(rows: list[dict[str, Any]], tolerance: float) -> str:
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


if __name__ == "__main__":
    main()
