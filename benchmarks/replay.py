"""How long the replay of a long run's log takes, and how much memory.

python -m benchmarks.replay [--completions 1000000] [--per_table 1024 128] [--repeats 5]

Writes a log as TRL does, one parquet file per generation batch: 8 completions per prompt, two rewards, a task, prompts
of about 100 characters and completions of about 300, and the advantages that `grpo` gives in float32. Then replays
every estimator over it in a fresh process, which also has to recognize `grpo` as the run's own, and measures that
process from start to end: seconds, seconds of its threads on a core, and the largest resident size. Prints them and
writes benchmarks/results/replay.json.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.machine import RESULTS, describe
from grpo_plus.advantages import Rewards, estimate

GENERATIONS = 8
SECONDS, BYTES = 60, 2**30

REPLAY = """
import json, resource, sys
from grpo_plus.replay import Rollouts, replay
result = replay(Rollouts(sys.argv[1]))
used = resource.getrusage(resource.RUSAGE_SELF)
assert result.same[:1] == ["grpo"], (result.same, result.difference)
print(json.dumps({"completions": result.statistics.completions, "batches": result.statistics.batches,
                  "estimators": len(result.names) - 1, "refused": sorted(result.refused),
                  "peak_bytes": used.ru_maxrss * 1024, "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}))
"""


def main() -> None:
    """Generate, replay and report each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--per_table", type=int, nargs="+", default=[1024, 128])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for per_table in args.per_table:
        with tempfile.TemporaryDirectory() as folder:
            write_log(Path(folder), args.completions, per_table)
            taken = [replayed(folder) for _ in range(args.repeats)]
        seconds = [run["seconds"] for run in taken]
        row: dict[str, Any] = taken[0] | {"per_table": per_table, "peak_bytes": max(run["peak_bytes"] for run in taken)}
        row |= {"seconds": round(statistics.median(seconds), 1), "lowest": min(seconds), "highest": max(seconds)}
        row["within_limits"] = row["highest"] <= SECONDS and row["peak_bytes"] <= BYTES
        rows.append(row)
        print(
            f"{row['completions']} completions in {row['batches']} tables, {row['estimators']} estimators: "
            f"{row['seconds']} s ({row['lowest']} to {row['highest']}, {row['cpu_seconds']} on a core), "
            f"{row['peak_bytes'] / 2**20:.0f} MiB"
        )
    summary = {
        "command": f"python -m benchmarks.replay --completions {args.completions} "
        f"--per_table {' '.join(map(str, args.per_table))} --repeats {args.repeats}",
        "machine": describe() | {"load": round(os.getloadavg()[0], 1)},
        "limits": {"seconds": SECONDS, "bytes": BYTES},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "replay.json").write_text(json.dumps(summary, indent=2) + "\n")


def write_log(run_dir: Path, completions: int, per_table: int) -> None:
    """A log of generated completions; the texts repeat after a while, the rewards do not."""
    folder = run_dir / "completions"
    folder.mkdir()
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(1000)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 80))) for _ in range(5000)]
    prompts = per_table // GENERATIONS
    for step in range(1, -(-completions // per_table) + 1):
        shape = (prompts, GENERATIONS)
        # Difficulties differ by prompt, so that some groups are all right or all wrong.
        chance = torch.rand(prompts, 1, generator=generator) * 1.4 - 0.2
        correct = (torch.rand(shape, generator=generator) < chance).float()
        brevity = -torch.rand(shape, generator=generator)
        values = torch.stack([correct, brevity], -1)
        rewards = Rewards(values.double(), torch.ones(2).double(), ("correct", "brevity"))
        table = {
            "step": [step] * per_table,
            "prompt": [
                f"{step}.{p} {texts[(step * prompts + p) % 5000][:95]}"
                for p in range(prompts)
                for _ in range(GENERATIONS)
            ],
            "completion": draw.choices(texts, k=per_table),
            "correct": correct.flatten().double().numpy(),
            "brevity": brevity.flatten().double().numpy(),
            "task": [("algebra", "geometry", "numbers")[p % 3] for p in range(prompts) for _ in range(GENERATIONS)],
            "advantage": estimate("grpo", rewards).float().flatten().double().numpy(),
        }
        pq.write_table(pa.table(table), folder / f"completions_{step:05d}.parquet")


def replayed(folder: str) -> dict[str, Any]:
    """One replay in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", REPLAY, folder], capture_output=True, text=True)
    seconds = round(time.perf_counter() - started, 1)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) | {"seconds": seconds}


if __name__ == "__main__":
    main()
