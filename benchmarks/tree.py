"""What sharing beyond the prompt saves in an update: tool transcripts of which several have the same first turn.

python -m benchmarks.tree [--repeats 5] [--threads 1] [--variants full lora]

Rows are one group of 8 completions: a prompt of 256 tokens, a first turn of 64, a tool's reply of 128, a last turn of
64. Of the rows, 8, 4 or none have the same first turn and reply. In a last case half of the rows are equal to the
end. The reply is masked out of the loss, as TRL does it. Stock TRL, our trainer with shared prompts alone, and our
trainer with prefix trees take turns in one process. Their gradients must agree before anything is timed. Model and
clock are those of `benchmarks.update` on a CPU. Writes benchmarks/results/tree.json after each row.
"""

import argparse
import json
import math
import os
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import RESULTS, describe, seconds
from benchmarks.update import TOLERANCE, run, trainer_of
from grpo_plus.packing import tree

PROMPT, FIRST, REPLY, LAST, G = 256, 64, 128, 64, 8
# Rows with the same beginning, and the tokens of that beginning.
CASES = {
    "8 of 8 the same first turn": (8, FIRST + REPLY),
    "4 of 8 the same first turn": (4, FIRST + REPLY),
    "4 of 8 equal": (4, FIRST + REPLY + LAST),
    "nothing in common": (1, FIRST + REPLY),
}
WAYS = ("trl", "prompts", "tree")


def main() -> None:
    """Check and time every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--variants", nargs="+", choices=("full", "lora"), default=("full", "lora"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for variant in args.variants:
        for case in CASES:
            rows.append(measure(case, variant, args.repeats) | {"load": round(os.getloadavg()[0], 1)})
            _show(rows[-1])
            summary = {
                "command": " ".join(["python -m benchmarks.tree", *sys.argv[1:]]),
                "machine": describe() | {"threads": args.threads},
                "rows": rows,
            }
            (RESULTS / "tree.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("written to tree.json")


def measure(case: str, variant: str, repeats: int) -> dict[str, Any]:
    """Tokens and seconds of each way, and how much faster the tree is than the others."""
    inputs = rows_of(*CASES[case])
    with patch("trl.trainer.utils._use_triton", return_value=True), ExitStack() as training:
        shape = PROMPT, FIRST + REPLY + LAST, G
        trainers = {side: trainer_of(side, shape, variant, "cpu") for side in ("trl", "plus")}
        training.enter_context(trainers["plus"].speed.around_training(trainers["plus"].model))
        trainers["plus"].model.load_state_dict(trainers["trl"].model.state_dict())
        gradients, tokens = {}, {}
        for way in WAYS:
            gradients[way] = _update(way, trainers, inputs)
            ratio = trainers["plus"]._metrics["train"].get("packing/token_ratio", [1.0])[-1]
            tokens[way] = round(G * sum(shape[:2]) / ratio)
        errors = [float((gradients[way] - gradients["trl"]).norm() / gradients["trl"].norm()) for way in WAYS]
        if max(errors) > TOLERANCE["cpu"]:
            raise SystemExit(f"gradients differ by {max(errors):.1e}")
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                taken[way].append(seconds(partial(_update, way, trainers, inputs), "cpu"))
    median = {way: statistics.median(times) for way, times in taken.items()}
    return {
        "case": case,
        "variant": variant,
        "tokens": tokens,
        "seconds": taken,
        "faster_than": {way: median[way] / median["tree"] for way in ("trl", "prompts")},
        "gradient_error": max(errors),
        "packing": trainers["plus"].speed.packer.describe(),
    }


def rows_of(alike: int, beginning: int) -> dict[str, Any]:
    """A micro-batch as TRL hands it to its loss: one group, of which some rows begin alike."""
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(3, 8000, (G, FIRST + REPLY + LAST), generator=generator)
    completions[:alike, :beginning] = completions[0, :beginning].clone()
    written = torch.ones_like(completions)
    written[:, FIRST : FIRST + REPLY] = 0
    prompt = torch.randint(3, 8000, (1, PROMPT), generator=generator).repeat(G, 1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "tool_mask": written,
        "advantages": torch.randn(G, generator=generator),
        "num_items_in_batch": written.sum(),
    }


def _update(way: str, trainers: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor:
    """One update's gradient, in one vector. Without trees, no beginning is long enough to be worth sharing."""
    trainer = trainers["trl" if way == "trl" else "plus"]
    with patch.object(tree, "LEAST_SAVED", math.inf if way == "prompts" else tree.LEAST_SAVED):
        run(trainer, [inputs])
    return torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None])


def _show(row: dict[str, Any]) -> None:
    tokens = ", ".join(str(row["tokens"][way]) for way in WAYS)
    faster = ", ".join(f"{ratio:.2f}x {way}" for way, ratio in row["faster_than"].items())
    print(f"{row['case']:<28} {row['variant']:<5} tokens {tokens}  tree: {faster}", flush=True)


if __name__ == "__main__":
    main()
