"""How much the demo learns: held-out accuracy before and after, and the time it takes, for several seeds.

python -m benchmarks.demo [--seeds 5] [--advantage_estimator NAME]

Prints a table and writes benchmarks/results/demo.json (or demo_NAME.json).
"""

import argparse
import json
import statistics
import tempfile

from benchmarks.machine import RESULTS, describe


def main() -> None:
    """Run the demo once per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--advantage_estimator")
    args = parser.parse_args()
    rows = [measure(seed, args.advantage_estimator) for seed in range(args.seeds)]
    print(f"{'seed':>4} {'before':>7} {'after':>7} {'seconds':>8}")
    for row in rows:
        print(f"{row['seed']:>4} {row['accuracy_before']:>7.1%} {row['accuracy_after']:>7.1%} {row['seconds']:>8.1f}")
    summary = {
        "command": f"python -m benchmarks.demo --seeds {args.seeds}"
        + (f" --advantage_estimator {args.advantage_estimator}" if args.advantage_estimator else ""),
        "machine": describe(),
        "highest_before": max(row["accuracy_before"] for row in rows),
        "lowest_after": min(row["accuracy_after"] for row in rows),
        "median_seconds": statistics.median(row["seconds"] for row in rows),
        "runs": rows,
    }
    name = f"demo_{args.advantage_estimator}.json" if args.advantage_estimator else "demo.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(summary, indent=2) + "\n")


def measure(seed: int, advantage_estimator: str | None) -> dict[str, float]:
    """One run of the demo in a temporary folder."""
    from grpo_plus.demo.run import run_demo

    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(folder, seed=seed, advantage_estimator=advantage_estimator)
    return {
        "seed": seed,
        "steps": result.steps,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "seconds": result.seconds,
    }


if __name__ == "__main__":
    main()
