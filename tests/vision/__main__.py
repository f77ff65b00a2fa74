"""Every family and setting against stock TRL, as a table: `python -m tests.vision [family ...]`.

The suite runs a few of these. The table takes minutes; it is for who changes how rows with images are computed.
"""

import logging
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.vision import FAMILIES, said
from tests.vision.following import EVERY_LORA, LANGUAGE_LORA, Run, changed, log_difference, relative, train


def seldom(completions: list[Any], **_: Any) -> list[float]:
    """Often the same for a whole group, so that groups are dead."""
    return [float("e" in text) for text in said(completions)]


SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
# What `Run` changes, by what the table calls it.
SETTINGS = {
    "full": {},
    "one picture": {"counts": (1, 1, 1, 1)},
    "equal sizes": {"counts": (2, 2), "equal": True},
    "frozen tower": {"frozen_tower": True},
    "LoRA": {"lora": LANGUAGE_LORA},
    "LoRA, tower too": {"lora": EVERY_LORA},
    "checkpointing": {"config": SPLIT | {"gradient_checkpointing": True}},
    "LoRA, checkpointing": {"lora": LANGUAGE_LORA, "config": SPLIT | {"gradient_checkpointing": True}},
    "KL": {"config": {"beta": 0.1}},
    "LoRA, KL": {"lora": LANGUAGE_LORA, "config": SPLIT | {"beta": 0.1}},
    "2 iterations": {"config": {"num_iterations": 2}},
    "4 steps a generation": {"config": SPLIT | {"steps_per_generation": 4}},
    "split groups": {"config": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}},
    "dead groups": {"config": SPLIT | {"steps_per_generation": 4, "reward_funcs": [seldom]}},
    "bf16": {"config": SPLIT | {"bf16": True}},
    "text between": {"counts": (1, 0, 2, 0), "config": {"per_device_train_batch_size": 4}},
    "truncated masked": {"config": {"mask_truncated_completions": True}},
    "20 steps": {"config": SPLIT | {"max_steps": 20, "learning_rate": 0.1}},
    "20 steps of LoRA": {"lora": LANGUAGE_LORA, "config": SPLIT | {"max_steps": 20, "beta": 0.1, "num_iterations": 2}},
}


def row(folder: Path, run: Run) -> str:
    try:
        stock = train(folder / "stock", run, ours=False)
    except ValueError as error:  # PEFT has no adapters for Gemma 4's tower
        return f"  not in stock TRL: {str(error).splitlines()[0]}"
    ours = train(folder / "ours", run, ours=True)
    difference, where = log_difference(ours, stock)
    packed = [entry["packing/token_ratio"] for entry in ours.log if "packing/token_ratio" in entry]
    return (
        f"{relative(ours.gradients, stock.gradients):9.1e} {relative(ours.weights, stock.weights):9.1e} "
        f"{changed(stock):9.1e} {difference:9.1e} {min(packed, default=1):7.2f}  {where}"
    )


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{'':37s}{'gradients':>9s} {'weights':>9s} {'moved':>9s} {'log':>9s} {'tokens':>7s}")
    for name in names:
        for setting, changes in SETTINGS.items():
            with tempfile.TemporaryDirectory() as folder:
                print(f"{name:14s}{setting:23s}{row(Path(folder), replace(Run(name), **changes))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
