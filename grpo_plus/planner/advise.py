"""Find the cheapest changes that make a run fit on a card."""

from dataclasses import dataclass, replace

from grpo_plus.planner.changes import CHANGES, Change, Settings
from grpo_plus.planner.constants import GIB, Constants
from grpo_plus.planner.largest import largest
from grpo_plus.planner.memory import MemoryPlan, plan
from grpo_plus.planner.run import Run, flags
from grpo_plus.planner.shapes import ModelShape

WORTH = 0.01  # share of the peak that a change must save to be advice


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
