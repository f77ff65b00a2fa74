"""What an estimator and its metrics cost per generation batch, beside a step of the demo.

python -m benchmarks.overhead [--steps 15] [--repeats 9] [--threads 1]

Trains the demo for a few steps, then times `estimate` and `advantage_metrics` on a batch of its shape (16 prompts x 8
completions x 2 rewards). Shares are of the *fastest* step: other work on the machine makes steps slower, and a share of
their median would flatter us. Prints a table and writes benchmarks/results/overhead.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe
from grpo_plus.advantages import Rewards, State, estimate
from grpo_plus.advantages.metrics import advantage_metrics

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "batch_std", "gdpo", "reinforce_pp_baseline", "rank", "loo_std", "ema_task")
PROMPTS, GENERATIONS, FUNCTIONS = 16, 8, 2
CALLS = 20  # per repeat: one call is too short for the clock
LIMIT = 0.01  # of a demo step


def main() -> None:
    """Time the demo's step, then every estimator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both sides")
    args = parser.parse_args()
    if args.repeats < 5 or args.steps < 6:
        parser.error("a median needs --repeats 5 and --steps 6 or more")
    torch.set_num_threads(args.threads)
    steps = step_seconds(args.steps)
    step, fastest = statistics.median(steps), min(steps)
    rows = measure(args.repeats, fastest)

    print(f"demo step: {fastest * 1e3:.0f} ms at the fastest, median {step * 1e3:.0f}, slowest {max(steps) * 1e3:.0f}")
    print(f"{'estimator':<22} {'ms':>7} {'lowest':>7} {'highest':>7} {'share':>7} {'worst':>7}")
    for row in rows:
        spread = f"{row['median_ms']:>7.3f} {row['lowest_ms']:>7.3f} {row['highest_ms']:>7.3f}"
        print(f"{row['estimator']:<22} {spread} {row['share']:>7.2%} {row['highest_share']:>7.2%}")
    dearest = max(rows, key=lambda row: row["share"])
    verdict = "below" if dearest["share"] < LIMIT else "NOT below"
    print(f"dearest: {dearest['estimator']}, {dearest['share']:.2%}: {verdict} {LIMIT:.0%} of the fastest demo step")

    summary = {
        "command": f"python -m benchmarks.overhead --steps {args.steps} --repeats {args.repeats} "
        f"--threads {args.threads}",
        "machine": describe() | {"load": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads()},
        "shape": {"prompts": PROMPTS, "generations": GENERATIONS, "reward_functions": FUNCTIONS},
        "calls_per_repeat": CALLS,
        "repeats": args.repeats,
        "demo_step_ms": {
            "median": round(step * 1e3, 2),
            "lowest": round(fastest * 1e3, 2),
            "highest": round(max(steps) * 1e3, 2),
            "steps": len(steps),
        },
        "highest_share": dearest["share"],
        "estimators": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(summary, indent=2) + "\n")


def step_seconds(steps: int) -> list[float]:
    """Seconds of each step of a short demo run, as TRL logs them, without the first: it pays for what runs once."""
    from grpo_plus.demo.run import run_demo

    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder, max_steps=steps)
        entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [entry["step_time"] for entry in entries if "step_time" in entry][1:]


def measure(repeats: int, step: float) -> list[dict[str, Any]]:
    """Milliseconds of estimator and metrics per batch, each repeat an average over some calls.

    The estimators take turns, so that a busy moment of the machine does not meet one of them alone.
    """
    rewards = demo_batch()
    states: dict[str, State] = {name: {} for name in ESTIMATORS}
    times: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for name in ESTIMATORS:
        once(name, rewards, states[name])
    for _ in range(repeats):
        for name in ESTIMATORS:
            started = time.perf_counter()
            for _ in range(CALLS):
                once(name, rewards, states[name])
            times[name].append((time.perf_counter() - started) / CALLS)
    return [
        {
            "estimator": name,
            "median_ms": round(statistics.median(taken) * 1e3, 4),
            "lowest_ms": round(min(taken) * 1e3, 4),
            "highest_ms": round(max(taken) * 1e3, 4),
            "share": round(statistics.median(taken) / step, 6),
            "highest_share": round(max(taken) / step, 6),
        }
        for name, taken in times.items()
    ]


def once(name: str, rewards: Rewards, state: State) -> None:
    """What the trainer adds to a generation batch."""
    advantages = estimate(name, rewards, state=state)
    advantage_metrics(rewards, advantages)


def demo_batch() -> Rewards:
    """A batch of the demo's shape. The task label, which the demo lacks, makes every metric run."""
    generator = torch.Generator().manual_seed(0)
    rows = PROMPTS * GENERATIONS
    correctness = torch.rand(rows, generator=generator)
    well_formed = torch.rand(rows, generator=generator).round()
    return Rewards.from_table(
        torch.stack([correctness, well_formed], dim=1),
        num_generations=GENERATIONS,
        weights=torch.ones(FUNCTIONS),
        names=("correctness", "format"),
        lengths=torch.randint(1, 9, (rows,), generator=generator),
        tasks=["sort"] * rows,
    )


if __name__ == "__main__":
    main()
