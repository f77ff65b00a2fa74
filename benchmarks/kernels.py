"""What the kernels cost, forward and backward, beside what they replace: the LM head, and a 4-bit layer with LoRA.

python -m benchmarks.kernels [--device cuda|cpu] [--parts head lora] [--repeats 5] [--blocks] [--threads 1]

On a GPU, the default where there is one: bfloat16, the head at Qwen3-4B's and Llama-3-8B's shape and a small one, the
layers of Qwen3-4B on nf4. On a CPU: float32 and less of everything; Triton's kernels do not run there. Equality comes
first: on a sample of rows, what is wrong against float64 ends the run. All sides take turns in one process; peaks are
above what was there before the call, and of a GPU only (`benchmarks.head` measures those of heads on a CPU). `kept` is
what a layer keeps for its backward. `roofline` is the time of the two matrix products alone over that of the head.
`--blocks` times the Triton head's candidates for its table of blocks and for its tile, and nothing else. Writes
benchmarks/results/kernels_<device>.json.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import head as heads
from benchmarks.lora_layer import LAYERS, SCALE, TOKENS, kept_mb, layer_case
from benchmarks.machine import RESULTS, describe, device_name, peak_mb, seconds
from grpo_plus.kernels.linear_logprob import backend, reference, why_not_on

SHAPES = {
    "cuda": ((4096, 2560, 151_936), (8192, 4096, 128_256), (1024, 2048, 32_000)),
    "cpu": ((192, 512, 32_000), (192, 256, 151_936)),
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
SAMPLE = 48  # rows that float64 checks
# Relative errors against float64 of log-probs, entropies and gradients; in bfloat16 the products' rounding is 1e-2.
TOLERANCE = {"cuda": 5e-2, "cpu": 1e-5}
BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16))
COLUMNS = (8192, 16384, 32768)


def liger_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The one operator of Liger's that returns log-probabilities and entropies."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    losses, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, targets, temperature=heads.TEMPERATURE, return_entropy=True
    )
    return -losses, entropy


def available_heads(device: str) -> dict[str, heads.Score]:
    """What runs on the device: TRL's first, which the others are compared with."""
    found = {
        "trl": heads.trl_head,
        "logits": partial(reference.linear_logprob, temperature=heads.TEMPERATURE),
        "torch": partial(backend("torch"), temperature=heads.TEMPERATURE),
    }
    if find_spec("liger_kernel") is not None:
        found["liger"] = liger_head
    if why_not_on("triton", device) is None and "TRITON_INTERPRET" not in os.environ:
        found["triton"] = partial(backend("triton"), temperature=heads.TEMPERATURE)
    return found


def main() -> None:
    """Check, time and weigh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=("head", "lora"), default=("head", "lora"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU, for all sides")
    parser.add_argument("--blocks", action="store_true", help="time the Triton head's blocks and tiles instead")
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error("a median needs --repeats 5 or more")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # so that a first call compiles
        if args.blocks:
            time_blocks(args.device, args.repeats)
            return
        write_parts({"head": head_rows, "lora": lora_rows}, args)


def write_parts(parts: dict[str, Callable[[str, int], Iterator[dict[str, Any]]]], args: argparse.Namespace) -> None:
    """Write the result file again after each row, so that a run that is stopped loses nothing."""
    optional = tuple(name for name in ("bitsandbytes", "peft", "triton", "liger-kernel") if _installed(name))
    machine = describe(optional) | {"device": device_name(args.device), "threads": args.threads}
    command = f"python -m benchmarks.kernels --device {args.device} --parts {' '.join(args.parts)}"
    summary: dict[str, Any] = {
        "command": f"{command} --repeats {args.repeats} --threads {args.threads}",
        "machine": machine | {"load": round(os.getloadavg()[0], 1)},
        "dtype": str(DTYPES[args.device]).removeprefix("torch."),
    }
    path = RESULTS / f"kernels_{args.device}.json"
    for part in args.parts:
        summary[part] = []
        for row in parts[part](args.device, args.repeats):
            summary[part].append(row)
            path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"written to {path.name}")


def _installed(package: str) -> bool:
    return find_spec(package.replace("-", "_")) is not None


def head_rows(device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per shape and head."""
    return (row for shape in SHAPES[device] for row in heads_at(shape, device, repeats))


def heads_at(shape: tuple[int, int, int], device: str, repeats: int) -> list[dict[str, Any]]:
    """Every head at one shape. A head that fails is a row with its failure."""
    case = _case(shape, device)
    calls = {name: partial(heads.once, head, *case) for name, head in available_heads(device).items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, call in list(calls.items()):
        row = dict(zip("NHV", shape, strict=True)) | {"head": name}
        try:
            row["first_call_s"] = round(seconds(call, device), 3)
            row["errors"] = _errors(call(), case, device)
            row["peak_mb"] = round(peak_mb(call, device)) if device == "cuda" else None
            rows[name] = row
        except Exception as failure:  # others' heads fail in ways of their own on a new card; the rest is still wanted
            print(f"{_label(shape)} {name}: {type(failure).__name__}")
            rows[name] = row | {"failure": f"{type(failure).__name__}: {failure}"}
            del calls[name]
    calls["roofline"] = _two_products(case)
    for name, figures in _in_turns(calls, device, repeats).items():
        rows.setdefault(name, dict(zip("NHV", shape, strict=True)) | {"head": name}).update(figures)
    for name, row in rows.items():
        if "median_s" in row:
            row["times_as_fast_as_trl"] = round(rows["trl"]["median_s"] / row["median_s"], 2)
            row["roofline"] = round(rows["roofline"]["median_s"] / row["median_s"], 2)
            print(
                f"{_label(shape)} {name:<9} {1e3 * row['median_s']:8.1f} ms {row['times_as_fast_as_trl']:5.2f}x TRL"
                f"  {row['roofline']:4.2f} of the roofline  peak {row.get('peak_mb')} MB  {row.get('errors', '')}",
                flush=True,
            )
    return list(rows.values())


def _case(shape: tuple[int, int, int], device: str) -> list[Tensor]:
    return [
        tensor.to(dtype=DTYPES[device]) if tensor.is_floating_point() else tensor
        for tensor in heads.inputs(*shape, device)
    ]


def _label(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape)).rjust(16)


def _errors(found: dict[str, Tensor], case: list[Tensor], device: str) -> dict[str, float]:
    """Relative to float64, on rows spread over all; ends the run where one is too large."""
    rows = torch.linspace(0, len(case[0]) - 1, SAMPLE).long().to(device)
    hidden, weight, targets, cotangent = case
    few = (hidden[rows].double(), weight.double(), targets[rows], cotangent[rows].double())
    truth = heads.once(partial(reference.linear_logprob, temperature=heads.TEMPERATURE), *few)
    errors = {name: float((found[name][rows] - value).norm() / value.norm()) for name, value in truth.items()}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[device]}
    if wrong:
        raise SystemExit(f"not float64's, relative to the norm: {wrong}")
    return {name: float(f"{error:.1e}") for name, error in errors.items()}


def _two_products(case: list[Tensor]) -> Callable[[], object]:
    """Logits, and logits times the weight: what a single pass cannot do without."""
    hidden, weight = case[:2]
    try:
        logits = torch.empty((len(hidden), len(weight)), dtype=hidden.dtype, device=hidden.device)
    except torch.OutOfMemoryError:  # the products of half the rows, twice
        half = _two_products([hidden[: len(hidden) // 2], weight])
        return lambda: (half(), half())
    vectors = torch.empty_like(hidden)
    return lambda: (torch.mm(hidden, weight.t(), out=logits), torch.mm(logits, weight, out=vectors))


def _in_turns(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Median, lowest and highest seconds of each call, after one each that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            spent = seconds(call, device)
            if turn:
                taken[name].append(spent)
    return {
        name: {
            "median_s": round(statistics.median(times), 6),
            "lowest_s": round(min(times), 6),
            "highest_s": round(max(times), 6),
        }
        for name, times in taken.items()
    }


def lora_rows(device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per layer, number of tokens, and whether autocast is on, which decides what PEFT copies."""
    settings = itertools.product(LAYERS, TOKENS[device], (True, False) if device == "cuda" else (False,))
    return (layer_row(name, tokens, autocast, device, repeats) for name, tokens, autocast in settings)


def layer_row(name: str, tokens: int, autocast: bool, device: str, repeats: int) -> dict[str, Any]:
    """One layer, by PEFT and by the kernel."""
    inputs, outputs = (size // SCALE[device] for size in LAYERS[name])
    row: dict[str, Any] = {"layer": name, "tokens": tokens, "in": inputs, "out": outputs, "autocast": autocast}
    with layer_case(tokens, inputs, outputs, device=device, dtype=DTYPES[device], autocast=autocast) as (calls, error):
        if not error <= TOLERANCE[device]:
            raise SystemExit(f"{name}: differs from PEFT's by {error:.1e}, relative to the norm")
        times = _in_turns(calls, device, repeats)
        row |= {"error": error, "seconds": times}
        row["times_as_fast"] = round(times["peft"]["median_s"] / times["fused"]["median_s"], 2)
        row["kept_mb"] = {side: round(kept_mb(call), 2) for side, call in calls.items()}
        if device == "cuda":
            row["peak_mb"] = {side: round(peak_mb(call, device), 1) for side, call in calls.items()}
    took = " and ".join(f"{1e3 * times[side]['median_s']:.2f}" for side in ("peft", "fused"))
    print(
        f"{name:>8} {_label((tokens, inputs, outputs))} autocast {autocast!s:<5} PEFT and ours {took} ms, "
        f"{row['times_as_fast']:.2f}x  kept {row['kept_mb']}  peak {row.get('peak_mb')} MB",
        flush=True,
    )
    return row


def time_blocks(device: str, repeats: int) -> None:
    """The Triton head at each shape, with other blocks and other tiles."""
    reason = why_not_on("triton", device)
    if reason is not None:
        raise SystemExit(f"--blocks needs the Triton head: {reason}")
    from grpo_plus.kernels.linear_logprob import triton

    capability = torch.cuda.get_device_capability()
    for shape in SHAPES[device]:
        case = _case(shape, device)
        call = partial(heads.once, available_heads(device)["triton"], *case)
        for blocks, columns in itertools.product(BLOCKS, COLUMNS):
            triton.BLOCKS[capability], triton.COLUMNS = triton.Blocks(*blocks), columns
            (figures,) = _in_turns({"triton": call}, device, repeats).values()
            print(
                f"{_label(shape)} blocks {blocks} columns {columns:>6} {1e3 * figures['median_s']:8.2f} ms", flush=True
            )


if __name__ == "__main__":
    main()
