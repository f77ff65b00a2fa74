"""Find the largest size of a run that fits on a card."""

from collections.abc import Callable
from dataclasses import replace
from math import isqrt

from grpo_plus.planner.constants import Constants
from grpo_plus.planner.generation import keeps_prompts_once
from grpo_plus.planner.memory import plan
from grpo_plus.planner.run import Run
from grpo_plus.planner.shapes import ModelShape

LONGEST = 2**20  # the most tokens or rows to look at
LARGEST_GROUP = 2**10  # the most generations at which prompts may begin to be kept once


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
    size = _largest_from(0, fits)
    if field != "num_generations":
        return size
    # A prompt that is kept once for its group takes less than its copies. From there on, larger groups may fit again.
    larger = range(size + 1, LARGEST_GROUP)
    once = next((value for value in larger if keeps_prompts_once(shape, resized(run, field, value))), None)
    return _largest_from(once, fits) if once is not None and fits(once) else size


def _largest_from(low: int, fits: Callable[[int], bool]) -> int:
    """Largest value that fits, where all between `low` and it do."""
    step = 1
    while low + step <= LONGEST and fits(low + step):
        low, step = low + step, 2 * step
    high = low + step
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
