"""Guard the numbers: launches, bytes, memory and speed beside stock TRL, and what they were when last written.

python -m benchmarks.check [--counts] [--write] [--repeats 5]

A figure that is worse than benchmarks/baseline.json allows ends the run with an error. So does a figure that is new or
gone. `--counts` looks at the counts alone, which takes seconds. `--write` writes what it measures in place of what the
file holds.

counts: exact. Kernel launches of an update on the host's side, and bytes that its forwards keep for the backward, of a
    tiny model on rows a quarter as long as those below. A layer is a model of two layers minus one of one. Launches of
    a layer in the forms that a GPU takes, and of an advantage estimator with its metrics.
memory: TRL's peak of an update over ours, in bytes of tensors.
speed: TRL's seconds of an update over ours, in seconds of the process, and a demo step over the dearest estimator. All
    are the fastest of several: other work on the machine makes a run slower and never faster.

Updates are those of benchmarks/update.py, on a CPU: a group of completions with a prompt of full length. `dead` is five
groups, two of them without advantage.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import overhead, update
from benchmarks.machine import describe
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import CASCADE, PADDING_FREE_FLASH
from tests.launches import Launches, launches_per_layer
from tests.packing.counting import kept_bytes
from tests.packing.layers import launches_of_a_layer
from tests.planner.tracking import Allocations

BASELINE = Path(__file__).parent / "baseline.json"
ALLOWED = {"counts": 0.0, "memory": 0.03, "speed": 0.2}  # how much worse a figure may be
# Prompt, longest completion, G. Half the lengths of what the README quotes, so that all of it takes two minutes.
CASES = (
    ((64, 64, 8), "dead"),
    ((256, 128, 8), "lora"),
    ((512, 64, 8), "lora-checkpointing"),
    ((32, 256, 8), "full"),
)
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
GPU_FORMS = (CASCADE, PADDING_FREE_FLASH, CACHED)
PINNED = ("trl", "transformers", "torch", "peft")  # whose versions the counts depend on
NAMES = {"trl": "TRL", "plus": "ours"}
DEMO_STEPS = 15
WHAT_TO_DO = """
{count} of {total} figures do not hold. Look for what changed them. If the change is worth its price, write the baseline
anew with `python -m benchmarks.check{counts} --write`, commit it with the change, and say why in the commit."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Line:
    """A figure as the baseline has it and as it is. None: it is not there.

    allowed: share of the earlier value by which it may be lower. 0: it is a count, which must not change.
    """

    name: str
    was: float | None
    now: float | None
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the figure is what it was, or no worse than allowed."""
        if self.was is None or self.now is None:
            return False
        return self.now >= self.was * (1 - self.allowed) if self.allowed else self.now == self.was

    def __str__(self) -> str:
        was, now = (f"{'-' if value is None else round(value, 2):>9}" for value in (self.was, self.now))
        bar = f"{(self.was or 0) * (1 - self.allowed):.2f} or more" if self.allowed else "the same"
        return f"{'ok  ' if self.holds else 'FAIL'} {self.name:<84} was {was}  is {now}  allowed: {bar}"


def main() -> None:
    """Measure, compare or write, and print a line per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="leave out memory and speed, which take two minutes")
    parser.add_argument("--write", action="store_true", help="write the baseline in place of checking it")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"counts": counts()} if args.counts else {"counts": counts(), **ratios(args.repeats)}
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    lines = compare(baseline, found)
    print(*lines, sep="\n")
    if args.write:
        machine = describe(("peft",)) | {"threads": 1, "load": round(os.getloadavg()[0], 1)}
        written = {kind: {"allowed": ALLOWED[kind], "machine": machine, "figures": found[kind]} for kind in found}
        BASELINE.write_text(json.dumps(baseline | written, indent=1) + "\n")
        print(f"written to {BASELINE.name}")
        return
    for note in other_versions(baseline):
        print(f"the baseline is of another version: {note}")
    if failed := sum(not line.holds for line in lines):
        sys.exit(WHAT_TO_DO.format(count=failed, total=len(lines), counts=" --counts" if args.counts else ""))


def compare(baseline: dict[str, Any], found: dict[str, Figures]) -> list[Line]:
    """A line per figure that was or is there, of the kinds that were measured."""
    lines = []
    for kind, figures in found.items():
        earlier = baseline.get(kind, {"allowed": ALLOWED[kind], "figures": {}})
        names = dict.fromkeys((*earlier["figures"], *figures))
        lines += [Line(name, earlier["figures"].get(name), figures.get(name), earlier["allowed"]) for name in names]
    return lines


def other_versions(baseline: dict[str, Any]) -> list[str]:
    """Packages that are not those the counts were written with. A CPU build of torch is no other version."""
    here, there = describe(("peft",))["versions"], baseline["counts"]["machine"]["versions"]
    pairs = {name: (here[name].partition("+")[0], there[name].partition("+")[0]) for name in PINNED}
    return [f"{name} {is_}, not {was}" for name, (is_, was) in pairs.items() if is_ != was]


def counts(cases: tuple[tuple[tuple[int, int, int], str], ...] = CASES) -> Figures:
    """Every count, which is the same on each machine."""
    figures: Figures = {}
    for (prompt, completion, generations), variant in cases:
        shape = prompt // 4, completion // 4, generations
        figures |= {f"{_words(shape, variant)}: {name}": count for name, count in of_an_update(shape, variant)}
    for form, groups in product(GPU_FORMS, (1, 8)):
        count = launches_of_a_layer(form, groups, lora=True)
        figures[f"{form}, {groups} x 8 rows, lora: launches per layer"] = count
    rewards = overhead.demo_batch()
    for estimator in overhead.ESTIMATORS:
        with Launches() as launched:
            overhead.once(estimator, rewards, {})
        figures[f"{estimator}: launches of an estimate"] = launched.counts.total()
    return figures


def of_an_update(shape: tuple[int, int, int], variant: str) -> Iterator[tuple[str, float]]:
    """Launches of an update and of one of its layers, and bytes that are kept for its backward, of both sides."""
    found = {layers: _counted(shape, variant, layers) for layers in (1, 2)}
    for side, name in NAMES.items():
        launched = {layers: sides[side][0] for layers, sides in found.items()}
        yield f"launches per layer, {name}", launches_per_layer(launched.__getitem__, (1, 2))
        yield f"launches of an update, {name}", launched[2]
        yield f"bytes kept for the backward, {name}", found[2][side][1]


def _counted(shape: tuple[int, int, int], variant: str, layers: int) -> dict[str, tuple[int, int]]:
    batches = update.batches_of(shape, variant, "cpu")
    model = update.CPU_MODEL | TINY | {"num_hidden_layers": layers}
    with update.sides(shape, variant, "cpu", model=model) as trainers:
        return {side: _launched_and_kept(trainer, batches) for side, trainer in trainers.items()}


def _launched_and_kept(trainer: Any, batches: list[dict[str, Any]]) -> tuple[int, int]:
    update.run(trainer, batches)  # the self-check, and what layers learn about each other
    trainer.model.zero_grad()
    kept_in_all = 0
    with Launches() as launched:
        for inputs in batches:
            with update.around_update(trainer):
                with kept_bytes() as kept:
                    loss = update.loss_of(trainer, inputs)
                for parameter in trainer.model.parameters():
                    kept.pop(parameter.untyped_storage()._cdata, None)
                kept_in_all += sum(kept.values())
                loss.backward()
    return launched.counts.total(), kept_in_all


def ratios(repeats: int) -> dict[str, Figures]:
    """Memory and speed of every case, once its gradients have been found equal, and the overhead of estimators."""
    memory: Figures = {}
    speed: Figures = {}
    for shape, variant in CASES:
        batches = update.batches_of(shape, variant, "cpu")
        with update.sides(shape, variant, "cpu") as trainers:
            update.gradient_error(trainers, batches, "cpu")
            taken = {side: min(times) for side, times in update.timed(trainers, batches, "cpu", repeats).items()}
            peaks = {side: _peak(trainer, batches) for side, trainer in trainers.items()}
        memory[f"{_words(shape, variant)}: TRL's peak over ours"] = peaks["trl"] / peaks["plus"]
        speed[f"{_words(shape, variant)}: TRL's seconds over ours"] = taken["trl"] / taken["plus"]
    step = min(overhead.step_seconds(DEMO_STEPS))
    dearest = max(row["lowest_ms"] for row in overhead.measure(repeats, step)) / 1e3
    speed["demo: a step over the dearest estimator"] = step / dearest
    return {"memory": memory, "speed": speed}


def _peak(trainer: Any, batches: list[dict[str, Any]]) -> int:
    trainer.model.zero_grad()
    rows = [tensor for inputs in batches for tensor in inputs.values()]
    with Allocations([*trainer.model.parameters(), *trainer.model.buffers(), *rows]) as counted:
        update.run(trainer, batches)
    return counted.peak


def _words(shape: tuple[int, int, int], variant: str) -> str:
    return f"{','.join(map(str, shape))} {variant}"


if __name__ == "__main__":
    main()
