"""What passes of bounded size cost and save: an update of a whole micro-batch in parts, beside the same in one.

python -m benchmarks.long [--device cuda|cpu] [--shape 512,2048,8] [--rows 2] [--repeats 5] [--variants lora ...]

Rows are one group of G completions of full length, so that nothing but the number of passes differs. A pass takes the
tokens of `--rows` rows and of their prompt. Both ways take turns in one trainer, and must give the same gradient before
anything is timed. Peaks are above what was there before, our check of the first rows included, on a CPU in a process of
each way's own. Models and clocks are those of `benchmarks.update`. Writes benchmarks/results/long.json after each row.
"""

import argparse
import json
import os
import statistics
import sys
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import RESULTS, describe, device_name, in_a_process, peak_mb, seconds
from benchmarks.update import CHOICES, TOLERANCE, rows_of, run, trainer_of

SHAPE = (512, 2048, 8)
VARIANTS = ("full", "checkpointing", "lora", "lora-checkpointing")
WAYS = ("one", "parts")


def main() -> None:
    """Check, time and weigh every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=_shape, default=SHAPE, metavar="PROMPT,COMPLETION,G")
    parser.add_argument("--rows", type=int, default=2, help="rows of a pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--variants", nargs="+", choices=CHOICES, default=VARIANTS)
    parser.add_argument("--case", nargs=2, metavar=("VARIANT", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        variant, way = args.case
        print(json.dumps(measure(args.shape, args.rows, variant, way, args.device, args.repeats)))
        return
    rows: list[dict[str, Any]] = []
    for variant in args.variants:
        rows.append(_row(variant, args) | {"load": round(os.getloadavg()[0], 1)})
        summary = {
            "command": "python -m benchmarks.long " + " ".join(sys.argv[1:]),
            "machine": describe() | {"threads": args.threads, "device": device_name(args.device)},
            "rows": rows,
        }
        (RESULTS / "long.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("written to long.json")


def _shape(text: str) -> tuple[int, int, int]:
    prompt, completion, generations = map(int, text.split(","))
    return prompt, completion, generations


def _row(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda":  # an allocator that counts needs no process of its own
        both = measure(args.shape, args.rows, variant, "both", args.device, args.repeats)
    else:
        both = _spawn(variant, "both", args)
        both["peak_mb"] = {way: _spawn(variant, way, args)["peak_mb"][way] for way in WAYS}
    medians = {way: statistics.median(times) for way, times in both["seconds"].items()}
    row = both | {
        "shape": args.shape,
        "rows_per_pass": args.rows,
        "variant": variant,
        "time_ratio": medians["parts"] / medians["one"],
        "memory_ratio": both["peak_mb"]["parts"] / max(both["peak_mb"]["one"], 1e-9),
    }
    print(
        f"{variant:<20} {row['passes']} passes  time {medians['one']:7.2f} s -> {medians['parts']:7.2f} s "
        f"({row['time_ratio']:.2f}x)  peak {row['peak_mb']['one']:7.0f} MB -> {row['peak_mb']['parts']:7.0f} MB "
        f"({row['memory_ratio']:.2f}x)  gradients {row['gradient_error']:.0e}",
        flush=True,
    )
    return row


def _spawn(variant: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--device", args.device, "--repeats", str(args.repeats), "--threads", str(args.threads)]
    arguments += ["--shape", ",".join(map(str, args.shape)), "--rows", str(args.rows), "--case", variant, way]
    return in_a_process("benchmarks.long", arguments, args.threads)


def measure(
    shape: tuple[int, int, int], rows: int, variant: str, way: str, device: str, repeats: int
) -> dict[str, Any]:
    """`way` both: check and time, and on a GPU weigh. "one" or "parts": the peak of one way alone."""
    prompt, completion, generations = shape
    batch = full_rows(shape, device)
    bounds = {"one": None, "parts": prompt + rows * completion}
    with patch("trl.trainer.utils._use_triton", return_value=True):
        trainer = trainer_of("plus", shape, variant, device)
        with trainer.speed.around_training(trainer.model):

            def update(name: str) -> None:
                trainer.speed.passes.tokens = bounds[name]
                run(trainer, [batch])

            if way != "both":  # the first update: what it frees stays with the process and would hide a later peak
                return {"peak_mb": {way: peak_mb(partial(update, way), device)}}
            error = _error(trainer, update)
            if error > TOLERANCE[device]:
                raise SystemExit(f"gradients differ by {error:.1e}")
            taken: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(repeats):
                for name in WAYS:
                    taken[name].append(seconds(partial(update, name), device))
            peaks = {name: peak_mb(partial(update, name), device) for name in WAYS} if device == "cuda" else {}
            return {
                "seconds": taken,
                "peak_mb": peaks,
                "gradient_error": error,
                "passes": -(-generations // rows),
                "packing": trainer.speed.packer.describe(),
            }


def full_rows(shape: tuple[int, int, int], device: str) -> dict[str, Any]:
    """A micro-batch as TRL hands it to its loss: one group of completions, all of them as long as the longest."""
    _, completion, generations = shape
    batch = rows_of(shape, device, 0, dead=False)
    ids = torch.randint(3, 8000, (generations, completion), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    return batch | {
        "completion_ids": ids.to(device),
        "completion_mask": mask.to(device),
        "num_items_in_batch": mask.sum().to(device),
    }


def _error(trainer: Any, update: Any) -> float:
    """Relative difference of the two ways' gradients."""
    found = {}
    for name in WAYS:
        update(name)
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        found[name] = torch.cat([weight.grad.flatten().float() for weight in weights])
    return float((found["parts"] - found["one"]).norm() / found["one"].norm())


if __name__ == "__main__":
    main()
