"""Whole steps of the demo with the speed-ups on and off: where the time goes, and that the training is the same.

python -m benchmarks.step [--device cuda] [--steps 12] [--rounds 5]

The demo's warmed-up model trains a few steps from the same start, off and on taking turns, with `StepProfile` attached;
figures are medians over all steps but each run's first two. The gradient norms of every step must agree. Prints a table
and writes benchmarks/results/step.json, on a GPU step_cuda.json.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe, device_name
from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, StepProfile
from grpo_plus.demo import task
from grpo_plus.demo.run import NUM_EXAMPLES, NUM_TRAIN, SETTINGS, WARM_UP_STEPS
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.demo.warmup import warm_up

SWITCHES: dict[str, dict[str, Any]] = {
    "off": {"packing": "none", "skip_zero_advantage": False},
    "on": {"packing": "auto", "skip_zero_advantage": None},
}
PHASES = ("generate_s", "score_s", "update_s")
SETTLING = 2  # steps: first allocations, the self-check


def main() -> None:
    """Train both ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=128, intermediate_size=256, num_heads=8, seed=0)
    warm_up(model, tokenizer, task.format_examples(NUM_EXAMPLES, 0), steps=WARM_UP_STEPS, seed=0)
    logs: dict[str, list[dict[str, float]]] = {name: [] for name in SWITCHES}
    for _ in range(args.rounds):
        for name in SWITCHES:
            logs[name].append(_train(copy.deepcopy(model), tokenizer, args, SWITCHES[name]))
    norms = [[entry["grad_norm"] for entry in logs[name][0]] for name in SWITCHES]
    difference = max(abs(on - off) / off for off, on in zip(*norms, strict=True))
    if difference > 1e-3:
        raise SystemExit(f"gradient norms differ by {difference:.1e}")
    rows = {name: _medians(runs) for name, runs in logs.items()}
    for name, row in rows.items():
        print(f"{name:<4}" + "  ".join(f"{phase} {1e3 * row[phase]:6.1f} ms" for phase in PHASES))
    print(f"update {rows['off']['update_s'] / rows['on']['update_s']:.2f}x; gradient norms within {difference:.0e}")
    summary = {
        "command": f"python -m benchmarks.step --device {args.device} --steps {args.steps} --rounds {args.rounds}",
        "machine": describe()
        | {"device": device_name(args.device), "load": round(os.getloadavg()[0], 1), "threads": 1},
        "largest_difference_of_gradient_norms": difference,
        "median_seconds": rows,
    }
    (RESULTS / ("step.json" if args.device == "cpu" else "step_cuda.json")).write_text(
        json.dumps(summary, indent=1) + "\n"
    )


def _train(model: Any, tokenizer: Any, args: argparse.Namespace, switches: dict[str, Any]) -> Any:
    settings = SETTINGS | {"use_cpu": args.device == "cpu"} | switches
    config = GRPOPlusConfig(tempfile.mkdtemp(), seed=0, max_steps=args.steps, loss_type="dapo", **settings)
    trainer = GRPOPlusTrainer(
        model=model,
        reward_funcs=[task.correctness_reward, task.format_reward],
        args=config,
        train_dataset=task.dataset("train", NUM_TRAIN, 0),
        processing_class=tokenizer,
    )
    trainer.add_callback(StepProfile(trainer))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "profile/update_s" in entry]


def _medians(runs: list[Any]) -> dict[str, float]:
    entries = [entry for run in runs for entry in run[SETTLING:]]
    return {phase: statistics.median(entry[f"profile/{phase}"] for entry in entries) for phase in PHASES}


if __name__ == "__main__":
    main()
