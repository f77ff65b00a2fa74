"""How much the demo learns: held-out accuracy before and after, and the time it takes, for several seeds.

python -m benchmarks.demo [--seeds 5] [--advantage_estimator NAME] [--qlora]

Prints a table and writes benchmarks/results/demo.json (or demo_NAME.json, demo_qlora.json).
"""

import argparse
import json
import statistics
import sys
import tempfile

from benchmarks.machine import RESULTS, describe


def main() -> None:
    """Run the demo once per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--advantage_estimator")
    parser.add_argument("--qlora", action="store_true", help="adapters on the warmed-up model in 4 bits")
    args = parser.parse_args()
    rows = [measure(seed, args.advantage_estimator, qlora=args.qlora) for seed in range(args.seeds)]
    print(f"{'seed':>4} {'before':>7} {'after':>7} {'seconds':>8}")
    for row in rows:
        print(f"{row['seed']:>4} {row['accuracy_before']:>7.1%} {row['accuracy_after']:>7.1%} {row['seconds']:>8.1f}")
    summary = {
        "command": " ".join(["python -m benchmarks.demo", *sys.argv[1:]]),
        "machine": describe(),
        "highest_before": max(row["accuracy_before"] for row in rows),
        "lowest_after": min(row["accuracy_after"] for row in rows),
        "median_seconds": statistics.median(row["seconds"] for row in rows),
        "runs": rows,
    }
    parts = ["demo", *filter(None, [args.advantage_estimator, "qlora" if args.qlora else None])]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{'_'.join(parts)}.json").write_text(json.dumps(summary, indent=2) + "\n")


def measure(seed: int, advantage_estimator: str | None, *, qlora: bool) -> dict[str, float]:
    """One run of the demo in a temporary folder."""
    from grpo_plus.demo.run import run_demo

    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(folder, seed=seed, advantage_estimator=advantage_estimator, qlora=qlora)
    return {
        "seed": seed,
        "steps": result.steps,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "seconds": result.seconds,
    }


if __name__ == "__main__":
    main()
