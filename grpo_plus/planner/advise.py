"""Find what fits on a card, and the cheapest changes that make a run fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from grpo_plus.planner.constants import GIB, Constants
from grpo_plus.planner.memory import MemoryPlan, plan
from grpo_plus.planner.run import Run, flags
from grpo_plus.planner.shapes import ModelShape

Settings = dict[str, Any]
LONGEST = 2**20  # the most tokens or rows to look at
WORTH = 0.01  # share of the peak that a change must save to be advice


@dataclass(frozen=True)
class Change:
    """A way to need less memory. `settings` gives what to set in a run, or None where that would change nothing."""

    cost: str
    settings: Callable[[Run], Settings | None]


Step = tuple[Change, Settings]


@dataclass(frozen=True)
class Suggestion:
    """A change: what to set, its cost, and the bytes that it takes off the peak after the suggestions before."""

    settings: Settings
    cost: str
    saves: float


@dataclass(frozen=True)
class Advice:
    """Changes to make, in order, and the memory that the run needs afterwards."""

    suggestions: tuple[Suggestion, ...]
    plan: MemoryPlan
    fits: bool

    def text(self) -> str:
        """One line per suggestion."""
        if not self.suggestions:
            return "It fits as it is." if self.fits else "Nothing that the planner knows would make it fit."
        lines = []
        for number, made in enumerate(self.suggestions, 1):
            lines.append(f"{number}. saves {made.saves / GIB:6.2f} GiB: {flags(made.settings)} ({made.cost})")
        verdict = "fits" if self.fits else "still does not fit"
        return "\n".join([*lines, f"Then it needs {self.plan.peak / GIB:.2f} GiB, in {self.plan.binding}: {verdict}."])


def _packs(run: Run) -> Settings | None:
    return {"packing": "auto"} if run.packing in ("none", "padding_free") else None


def _halves_weights(run: Run) -> Settings | None:
    # Not weights that train: at GRPO's learning rates their updates would round to nothing.
    return {"dtype": "bfloat16"} if run.dtype == "float32" and run.lora_r else None


def _nests(run: Run) -> Settings | None:
    return {"use_bnb_nested_quant": True} if run.load_in_4bit and not run.use_bnb_nested_quant else None


def _chunks(run: Run) -> Settings | None:
    rows = run.generated_at_once
    return {"generation_chunk_size": -(-rows // 2)} if rows > 1 else None


def _checkpoints(run: Run) -> Settings | None:
    return None if run.gradient_checkpointing else {"gradient_checkpointing": True}


def _halves_micro_batch(run: Run) -> Settings | None:
    rows = run.per_device_train_batch_size
    if rows % 2:
        return None
    settings = {
        "per_device_train_batch_size": rows // 2,
        "gradient_accumulation_steps": 2 * run.gradient_accumulation_steps,
    }
    return settings | ({"steps_per_generation": 2 * run.steps_per_generation} if run.steps_per_generation else {})


def _drops_dropout(run: Run) -> Settings | None:
    return {"lora_dropout": 0.0} if run.lora_dropout else None


def _shrinks_state(run: Run) -> Settings | None:
    return {"optim": "adamw_8bit"} if run.optim in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit") else None


def _drops_reference(run: Run) -> Settings | None:
    return {"beta": 0.0} if run.beta else None


def _adapts(run: Run) -> Settings | None:
    return {"lora_r": 16} if run.lora_r is None else None


def _quantizes(run: Run) -> Settings | None:
    if run.quantized:
        return None
    return {"load_in_4bit": True, "use_bnb_nested_quant": True, "lora_r": run.lora_r or 16, "adapter_dtype": "float32"}


# Cheapest first: what costs nothing, then time, then what changes the training.
CHANGES = (
    Change("same gradients, faster", _packs),
    Change("frozen weights in half precision; adapters stay as they are", _halves_weights),
    Change("dropout belongs off in GRPO: it makes the old policy another one", _drops_dropout),
    Change("a little time to load", _nests),
    Change("optimizer state in 8 bits", _shrinks_state),
    Change("same update, more calls of generate", _chunks),
    Change("same gradients, about a third more time in the update", _checkpoints),
    Change("same update in more and smaller passes", _halves_micro_batch),
    Change("no KL to a reference: changes the loss", _drops_reference),
    Change("trains adapters; in training: --use_peft --lora_target_modules all-linear --lora_dropout 0", _adapts),
    Change("quantizes the frozen weights; in training: --qlora", _quantizes),
)


def advise(
    shape: ModelShape, gpu_bytes: float, run: Run | None = None, *, constants: Constants | None = None
) -> Advice:
    """Find the cheapest changes after which the run fits, and what each saves. Shorter completions come last."""
    first = plan(shape, run, constants=constants)
    steps: list[Step] = []
    current = first
    while not current.fits(gpu_bytes):
        step = _cheapest(current) or _shorter(current, gpu_bytes)
        if step is None:
            break
        steps.append(step)
        current = _changed(current, step)
    if current.fits(gpu_bytes):
        for step in reversed(steps):  # drop what later steps made superfluous, the dearest first
            kept = [other for other in steps if other is not step]
            replayed = _replayed(first, kept)
            if replayed is not None and replayed[-1].fits(gpu_bytes):
                steps = kept
    steps = _ordered(first, steps)
    plans = _replayed(first, steps) or [first]
    return Advice(tuple(_merged(steps, plans)), plans[-1], plans[-1].fits(gpu_bytes))


def _changed(current: MemoryPlan, step: Step) -> MemoryPlan:
    return plan(current.shape, replace(current.run, **step[1]), constants=current.constants)


def _replayed(first: MemoryPlan, steps: list[Step]) -> list[MemoryPlan] | None:
    """Plans after each step. None where a step would not be offered at its place."""
    plans = [first]
    for step in steps:
        if step[0].settings(plans[-1].run) is None:
            return None
        plans.append(_changed(plans[-1], step))
    return plans


def _ordered(first: MemoryPlan, steps: list[Step]) -> list[Step]:
    """Order the steps so that each saves something, where possible. Another phase may bind before that place."""
    ordered: list[Step] = []
    current, left = first, list(steps)
    while left:
        offered = [step for step in left if step[0].settings(current.run) is not None] or left
        useful = (step for step in offered if current.peak - _changed(current, step).peak > WORTH * current.peak)
        step = next(useful, offered[0])
        current = _changed(current, step)
        ordered.append(step)
        left.remove(step)
    return ordered


def _cheapest(current: MemoryPlan) -> Step | None:
    for change in CHANGES:
        settings = change.settings(current.run)
        if settings is None:
            continue
        if current.peak - _changed(current, (change, settings)).peak > WORTH * current.peak:
            return change, settings
    return None


def _shorter(current: MemoryPlan, gpu_bytes: float) -> Step | None:
    longest = largest(current.shape, current.run, gpu_bytes, "max_completion_length", constants=current.constants)
    if longest < 1 or longest >= current.run.max_completion_length:
        return None
    settings = {"max_completion_length": longest}
    return Change("cuts completions short", lambda _: settings), settings


def _merged(steps: list[Step], plans: list[MemoryPlan]) -> list[Suggestion]:
    """Merge the changes of one setting into one suggestion."""
    merged: dict[tuple[str, ...], Suggestion] = {}
    for (change, settings), before, after in zip(steps, plans, plans[1:], strict=False):
        key = tuple(settings)
        saved = merged[key].saves if key in merged else 0
        merged[key] = Suggestion(settings, change.cost, saved + before.peak - after.peak)
    return list(merged.values())


def largest(shape: ModelShape, run: Run, gpu_bytes: float, field: str, *, constants: Constants | None = None) -> int:
    """Largest value of a size that still fits, all else equal. 0 where no value fits.

    Args:
        field: "max_completion_length", "num_generations" (the number of prompts per generation batch stays), or
            "per_device_train_batch_size" (the generation batch stays).
    """

    def fits(value: int) -> bool:
        return plan(shape, resized(run, field, value), constants=constants).fits(gpu_bytes)

    if field == "per_device_train_batch_size":
        return max(filter(fits, _divisors(run.generation_rows)), default=0)
    low, high = 0, 1
    while high <= LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def resized(run: Run, field: str, value: int) -> Run:
    """Run with another size, and with as many prompts per generation and per optimizer step as before.

    Another number of generations, or of rows per pass, changes `per_device_train_batch_size`,
    `gradient_accumulation_steps` and, where set, `steps_per_generation` along.
    """
    if field == "max_completion_length":
        return replace(run, max_completion_length=value)
    rows, batch, group = run.generation_rows, value, run.num_generations
    if field == "num_generations":
        rows, group = rows // group * value, value
        batch = max(size for size in _divisors(rows) if size <= run.per_device_train_batch_size)
    elif field != "per_device_train_batch_size":
        raise ValueError(
            f"field={field!r} has no largest value here. Use max_completion_length, num_generations or "
            "per_device_train_batch_size."
        )
    steps, before = rows // batch, run.steps_per_generation or run.gradient_accumulation_steps
    return replace(
        run,
        num_generations=group,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=max(1, run.gradient_accumulation_steps * steps // before),
        steps_per_generation=None if run.steps_per_generation is None else steps,
    )


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
