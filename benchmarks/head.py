"""What the LM head costs, forward and backward: grpo_plus's single pass beside TRL's head and plain logits.

python -m benchmarks.head [--repeats 5] [--threads 1]

A frozen head in float32 scores N tokens with an arbitrary loss. All three see the N valid tokens only, as TRL's does on
a GPU; on a CPU it also scores the prompt. Equality of log-probs, entropies and gradients comes first: a wrong result
ends the run. The three take turns. Peaks are the high-water mark of the resident memory of one process per case, above
what it held before the call. Prints a table and writes benchmarks/results/head.json.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, describe
from grpo_plus.kernels.linear_logprob import linear_logprob, reference

SHAPES = ((192, 512, 32000), (192, 2048, 32000), (192, 512, 151936), (1024, 512, 32000), (1024, 512, 151936))
TEMPERATURE = 0.9
CHUNK = 32768  # TRL's own
RTOL = {"logps": 1e-5, "entropy": 1e-5, "gradient": 1e-5}

Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def trl_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The operator inside the model that TRL's trainers patch."""
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy")
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, TEMPERATURE, CHUNK, None, 1.0, outputs)[:2]


HEADS: dict[str, Score] = {
    "trl": trl_head,
    "logits": partial(reference.linear_logprob, temperature=TEMPERATURE),
    "single_pass": partial(linear_logprob, temperature=TEMPERATURE),
}


def main() -> None:
    """Check, time and weigh every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all sides")
    parser.add_argument("--peak", nargs=4, metavar=("HEAD", "N", "H", "V"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_bytes(args.peak[0], *map(int, args.peak[1:])))
        return
    if args.repeats < 5:
        parser.error("a median needs --repeats 5 or more")
    machine = describe() | {"load": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads()}
    print(json.dumps(machine))
    print(f"{'N':>5} {'H':>5} {'V':>7} {'head':<12} {'s':>7} {'lowest':>7} {'highest':>7} {'x TRL':>6} {'peak MB':>8}")
    rows = [row for shape in SHAPES for row in measure(shape, args.repeats)]
    summary = {
        "command": f"python -m benchmarks.head --repeats {args.repeats} --threads {args.threads}",
        "machine": machine,
        "dtype": "float32",
        "repeats": args.repeats,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "head.json").write_text(json.dumps(summary, indent=2) + "\n")


def measure(shape: tuple[int, int, int], repeats: int) -> list[dict[str, Any]]:
    """One row per head for (N, H, V)."""
    case = inputs(*shape)
    check(case)
    times: dict[str, list[float]] = {name: [] for name in HEADS}
    for _ in range(repeats):
        for name, head in HEADS.items():
            started = time.perf_counter()
            once(head, *case)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = []
    for name, taken in times.items():
        row = dict(zip("NHV", shape, strict=True)) | {
            "head": name,
            "median_s": round(medians[name], 4),
            "lowest_s": round(min(taken), 4),
            "highest_s": round(max(taken), 4),
            "times_as_fast_as_trl": round(medians["trl"] / medians[name], 2),
            "peak_mb": round(in_a_fresh_process(name, shape) / 1e6),
        }
        spread = f"{row['median_s']:>7.3f} {row['lowest_s']:>7.3f} {row['highest_s']:>7.3f}"
        ratio = f"{row['times_as_fast_as_trl']:>6.2f} {row['peak_mb']:>8}"
        print(f"{shape[0]:>5} {shape[1]:>5} {shape[2]:>7} {name:<12} {spread} {ratio}", flush=True)
        rows.append(row)
    return rows


def inputs(count: int, width: int, vocab: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a frozen weight, targets, and the loss's derivative by the log-probs, made on the device."""
    new: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    weight = torch.randn(vocab, width, **new).mul_(2 / math.sqrt(width))
    targets = torch.randint(vocab, (count,), **new)
    return torch.randn(count, width, **new), weight, targets, torch.randn(count, **new)


def once(head: Score, hidden: Tensor, weight: Tensor, targets: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Forward and backward."""
    hidden = hidden.detach().requires_grad_()
    logps, entropy = head(hidden, weight, targets)
    logps.backward(cotangent)
    assert hidden.grad is not None
    return {"logps": logps.detach(), "entropy": entropy.detach(), "gradient": hidden.grad}


def check(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """End the run unless every head gives TRL's numbers. It also warms them up."""
    expected = once(HEADS["trl"], *case)
    for head in HEADS:
        for name, value in once(HEADS[head], *case).items():
            error = float((value - expected[name]).norm() / expected[name].norm())
            if not error <= RTOL[name]:
                raise SystemExit(f"{head}: {name} differ from TRL's by {error:.1e}, relative to their norm")


def in_a_fresh_process(head: str, shape: tuple[int, int, int]) -> int:
    """`peak_bytes` where nothing was allocated before."""
    command = [sys.executable, "-m", "benchmarks.head", "--threads", "1", "--peak", head, *map(str, shape)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_bytes(head: str, *shape: int) -> int:
    """What one forward and backward adds to the largest resident size that the process has had."""
    once(HEADS[head], *inputs(2, 8, 16))  # what is imported and set up on first use
    case = inputs(*shape)
    before = high_water()
    once(HEADS[head], *case)
    return high_water() - before


def high_water() -> int:
    """The largest resident size that this program has had, in bytes: getrusage's starts with that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


if __name__ == "__main__":
    main()
