"""The longest completion that runs in so much GPU memory: stock TRL, TRL tuned, and grpo_plus with chunked generation.

python -m benchmarks.memory_cap [--model Qwen3-4B] [--caps 8GB 12GB 16GB 24GB] [--tolerance 0.1]      on a GPU
python -m benchmarks.memory_cap --tiny --caps 150MB                       on a CPU, to see that it runs

torch may allocate the cap and no more (set_per_process_memory_fraction); the CUDA context comes on top. Every trial is
a process of its own with random weights in nf4 and two optimizer steps of 8 completions of full length. The search
begins at the length that the planner expects and ends where a run that fits and one that does not are within the
tolerance. Completions are random ids. Of their generation only the last step runs, on a cache of full length with
random keys and values: the step that needs most, without the hours before it. Prints a table, with the seconds that the
second update took per million tokens of prompts and completions, and writes benchmarks/results/memory_cap.json.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe
from benchmarks.memory_run import MODELS, OUT_OF_MEMORY, TINY, TRL_DEFAULT, TRL_TUNED, Case, in_a_fresh_process
from grpo_plus.planner import QLORA, Constants, Run, largest, parse_bytes, shape_of

ROWS = {"prompt_length": 256, "per_device_train_batch_size": 8, "num_generations": 8}
SMALL_PASSES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "generation_chunk_size": 2}
# A number and not "auto", which would look at the whole card's memory and not at the cap.
ONE_ROW = {"max_tokens_per_pass": 1, "generation_chunk_size": 1, "offload_activations": True}
SETTINGS = {
    "TRL's defaults": (Run(**ROWS, **TRL_DEFAULT), True),
    "TRL, tuned": (Run(**ROWS, **TRL_TUNED), True),
    "grpo_plus": (Run(**ROWS, **QLORA), False),
    "grpo_plus, two rows at a time": (Run(**QLORA | ROWS | SMALL_PASSES), False),
    "grpo_plus, every exact switch": (Run(**QLORA | ROWS | ONE_ROW), False),
}
TINY_SETTINGS = {"LoRA": (Run(**ROWS | {"prompt_length": 32}, lora_r=8, bf16=False, packing="none"), True)}
LONGEST = 262_144
WITHIN_THE_CAP = Constants(context_bytes=0, unusable_bytes=0)


def main() -> None:
    """Search for every cap and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen3-4B")
    parser.add_argument("--caps", nargs="+", type=parse_bytes, default=[gib * 2**30 for gib in (8, 12, 16, 24)])
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. --tiny runs on the CPU")
    config, settings, device = (TINY, TINY_SETTINGS, "cpu") if args.tiny else (MODELS[args.model], SETTINGS, "cuda")
    print(f"{'cap':>6} {'settings':<36} {'planned':>8} {'runs':>8}   update   (tokens of a completion, seconds)")
    rows = []
    for cap in args.caps:
        for name, (run, stock) in settings.items():
            row = {"cap": cap, "settings": name} | search(
                Case(config, run, device, cap, stock, last_step=True), args.tolerance
            )
            figures = f"{row['planned']:>8} {row['runs']:>8} {row['update_s_per_million']:>8.0f}"
            print(f"{cap / 2**30:>4.3g}GB {name:<36} {figures}", flush=True)
            rows.append(row)
    if device == "cuda":
        machine = describe() | {"gpu": torch.cuda.get_device_name()}
        command = f"python -m benchmarks.memory_cap {' '.join(sys.argv[1:])}".strip()
        result = {"command": command, "machine": machine, "model": args.model, "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "memory_cap.json").write_text(json.dumps(result, indent=2) + "\n")


def search(case: Case, tolerance: float) -> dict[str, Any]:
    """The longest completion that is planned to fit under the cap, and the longest that was seen to run."""
    assert case.cap is not None
    planned = largest(shape_of(case.config), case.run, case.cap, "max_completion_length", constants=WITHIN_THE_CAP)

    seconds = {0: 0.0}

    def runs(length: int) -> bool:
        measured = in_a_fresh_process(replace(case, run=replace(case.run, max_completion_length=length)))
        if measured.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY:
            raise RuntimeError(f"A completion of {length} tokens failed for another reason: {measured['error']}")
        seconds[length] = measured.get("update_s", 0.0)
        return "error" not in measured

    found = longest(runs, min(max(planned, 1), LONGEST), tolerance)
    rows = case.run.per_device_train_batch_size * case.run.gradient_accumulation_steps
    tokens = rows * (case.run.prompt_length + found)
    return {"planned": planned, "runs": found, "update_s_per_million": 1e6 * seconds[found] / tokens}


def longest(runs: Callable[[int], bool], start: int, tolerance: float) -> int:
    """The largest length known to run, where one longer by the tolerance does not; 0 where not even one token runs.

    Args:
        runs: monotone: what runs at a length runs at a shorter one.
        start: where to look first; the nearer, the fewer trials.
    """
    low, high = (start, 0) if runs(start) else (0, start)
    while not high and low < LONGEST:
        longer = min(max(low + 1, int(low * (1 + 2 * tolerance))), LONGEST)
        low, high = (longer, 0) if runs(longer) else (low, longer)
    while not low and high > 1:
        shorter = int(high / (1 + 2 * tolerance))
        low, high = (shorter, high) if runs(shorter) else (0, shorter)
    while low and high > max(low + 1, low * (1 + tolerance)):
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low


if __name__ == "__main__":
    main()
