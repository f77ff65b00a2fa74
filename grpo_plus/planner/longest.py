"""The longest completion that fits on each of several cards: TRL's defaults and TRL tuned beside the run's settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from grpo_plus.planner.changes import leanest
from grpo_plus.planner.constants import GIB, Constants
from grpo_plus.planner.largest import largest, resized
from grpo_plus.planner.memory import MemoryPlan, plan
from grpo_plus.planner.run import Run, flags
from grpo_plus.planner.shapes import ModelShape

TRL_ROWS = 8  # per_device_train_batch_size of TRL
TUNED = "TRL, tuned"
CHUNKED = "TRL, tuned, if it generated one row at a time"
LEANEST = "grpo_plus, every exact switch"


@dataclass(frozen=True)
class Longest:
    """The longest completions of one set of settings.

    Attributes:
        run: the settings.
        plans: for each card the plan at its longest completion. None where not even one token fits.
    """

    name: str
    run: Run
    plans: tuple[MemoryPlan | None, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The longest completion on each card. 0 where not even one token fits."""
        return tuple(0 if planned is None else planned.run.max_completion_length for planned in self.plans)


def setups(run: Run) -> dict[str, Run]:
    """Settings to compare, by name: the same base, prompts, groups and loss under TRL and under grpo_plus.

    TRL tuned is what somebody sets who knows TRL well: weights that do not train in bfloat16, nested scales, the
    optimizer in 8 bits, one row per pass. TRL generates a whole generation batch at a time. Its setting with one row at
    a time is for the comparison: TRL has no such setting.
    """
    tuned = _tuned(run)
    return {
        "TRL, its defaults": _stock(run),
        TUNED: tuned,
        CHUNKED: replace(tuned, generation_chunk_size=1),
        "grpo_plus, these settings": run,
        LEANEST: leanest(run),
    }


def _stock(run: Run) -> Run:
    """The run as TRL's defaults have it. Above a quantized base TRL puts the adapters into bfloat16."""
    rows = next(size for size in range(TRL_ROWS, 0, -1) if run.generation_rows % size == 0)
    return Run(
        prompt_length=run.prompt_length,
        max_completion_length=run.max_completion_length,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=run.generation_rows // rows,
        num_generations=run.num_generations,
        num_iterations=run.num_iterations,
        beta=run.beta,
        packing="none",
        max_tokens_per_pass=None,
        load_in_4bit=run.load_in_4bit,
        load_in_8bit=run.load_in_8bit,
        lora_r=run.lora_r,
        adapter_dtype="bfloat16" if run.quantized else None,
    )


def _tuned(run: Run) -> Run:
    stock = resized(_stock(run), "per_device_train_batch_size", 1)
    return replace(
        stock,
        dtype="bfloat16" if run.lora_r else stock.dtype,
        use_bnb_nested_quant=run.load_in_4bit,
        optim="adamw_8bit",
    )


def longest(
    shape: ModelShape, run: Run, cards: Sequence[int], *, constants: Constants | None = None
) -> tuple[Longest, ...]:
    """Find the longest completion of each setup on cards of so many bytes."""
    return tuple(
        Longest(name, setup, tuple(_longest_plan(shape, setup, card, constants) for card in cards))
        for name, setup in setups(run).items()
    )


def _longest_plan(shape: ModelShape, run: Run, card: int, constants: Constants | None) -> MemoryPlan | None:
    tokens = largest(shape, run, card, "max_completion_length", constants=constants)
    return plan(shape, replace(run, max_completion_length=tokens), constants=constants) if tokens else None


def longest_table(found: Sequence[Longest], cards: Sequence[int]) -> str:
    """One line for each setup, one column for each card, and what the last line takes of the host's memory."""
    width = max(len(one.name) for one in found)
    lines = [_line("longest completion, in tokens", width, [f"{card / GIB:g} GB" for card in cards])]
    lines += [_line(one.name, width, [f"{tokens:,}" for tokens in one.tokens]) for one in found]
    last = found[-1]
    lines.append(_line("  fullest phase", width, [one.binding if one else "load" for one in last.plans]))
    lines.append(
        _line("  in the host's memory", width, [f"{one.host / GIB:.1f} GiB" if one else "" for one in last.plans])
    )
    if changed := flags(last.run.changed_from(found[-2].run)):
        lines.append(f"  with {changed}")
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, width: int, cells: Sequence[str]) -> str:
    return " ".join([f"{name:<{width}}", *(f"{cell:>10}" for cell in cells)])
