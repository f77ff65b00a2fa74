"""The longest completion that fits on each card, by the planner's arithmetic, and a picture of what fills a card.

python -m benchmarks.longest

Nothing is measured here. Writes docs/memory.svg and benchmarks/results/longest.json. From that file
`python -m tests.readme` makes the tables of README.md and docs/memory.md.
"""

import json
from dataclasses import replace
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.memory_run import MODELS
from benchmarks.pictures import write
from grpo_plus.planner import QLORA, Constants, Longest, Run, longest, plan, shape_of
from grpo_plus.planner.constants import GIB
from grpo_plus.planner.longest import LEANEST, TUNED, setups
from grpo_plus.report.svg import INK, SERIES, SOFT, WIDTH, name_rows, settings, to_svg

CARDS = (8, 12, 16, 24)
NAMES = ("Qwen3-4B", "Qwen3-8B")
RUN = Run(**QLORA)
RECIPES = (
    (8, "Qwen3-4B", 16_384),
    (12, "Qwen3-4B", 32_768),
    (12, "Qwen3-8B", 16_384),
    (16, "Qwen3-4B", 65_536),
    (16, "Qwen3-8B", 32_768),
    (24, "Qwen3-4B", 100_000),
    (24, "Qwen3-8B", 65_536),
)
DRAWN = {"model": "Qwen3-4B", "card": 12, "tokens": 16_384}  # a length that TRL tuned does not reach on this card

LABEL = 2  # GiB that a number takes in the picture

# Causes of the plan in the order and under the names of the picture.
PARTS = {
    "context of the driver": ("context",),
    "weights": ("weights", "being loaded"),
    "adapters, gradients, optimizer": (
        "adapters",
        "adapter copies",
        "gradients",
        "optimizer state",
        "optimizer copies",
    ),
    "KV cache": ("KV cache",),
    "layer inputs": ("layer inputs",),
    "one layer": ("one layer", "activations"),
    "logits": ("logits",),
}


def main() -> None:
    """Write the table and the picture."""
    result = table()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "longest.json").write_text(json.dumps(result, indent=2) + "\n")
    write("memory.svg", picture(result["picture"]))


def table() -> dict[str, Any]:
    """All that is written, as it goes into the JSON file."""
    return {
        "command": "python -m benchmarks.longest",
        "note": "arithmetic of the planner; nothing was measured",
        "constants": vars(Constants()),
        "cards_gb": CARDS,
        "prompt_length": RUN.prompt_length,
        "num_generations": RUN.num_generations,
        "rows": [_row(name, one) for name in NAMES for one in _longest(name)],
        "recipes": [_recipe(*recipe) for recipe in RECIPES],
        "picture": _phases(),
    }


def _longest(name: str) -> tuple[Longest, ...]:
    return longest(shape_of(MODELS[name]), RUN, [card * GIB for card in CARDS])


def _row(model: str, one: Longest) -> dict[str, Any]:
    return {
        "model": model,
        "settings": one.name,
        "changed": one.run.changed_from(Run()),
        "tokens": one.tokens,
        "binds": [planned and planned.binding for planned in one.plans],
        "host_gib": [planned and round(planned.host / GIB, 1) for planned in one.plans],
    }


def _recipe(card: int, model: str, tokens: int) -> dict[str, Any]:
    """The plan of completions of so many tokens with every exact switch, which has to fit on the card."""
    planned = plan(shape_of(MODELS[model]), replace(setups(RUN)[LEANEST], max_completion_length=tokens))
    if not planned.fits(card * GIB):
        raise ValueError(f"RECIPES: {model} with {tokens} tokens does not fit on {card} GB. Write fewer tokens.")
    return {
        "card_gb": card,
        "model": model,
        "tokens": tokens,
        "peak_gib": round(planned.peak / GIB, 1),
        "binds": planned.binding,
        "host_gib": round(planned.host / GIB, 1),
    }


def _phases() -> dict[str, Any]:
    """GiB by settings, phase and part of the picture."""
    shape, runs = shape_of(MODELS[DRAWN["model"]]), setups(RUN)
    drawn = {}
    for name in (TUNED, LEANEST):
        planned = plan(shape, replace(runs[name], max_completion_length=DRAWN["tokens"]))
        drawn[name] = {
            phase: {part: round(sum(causes.get(name, 0) for name in names) / GIB, 2) for part, names in PARTS.items()}
            for phase, causes in planned.phases.items()
        }
    return DRAWN | {"usable_gib": round(DRAWN["card"] - Constants().unusable_bytes / GIB, 2), "gib": drawn}


def picture(drawn: dict[str, Any]) -> str:
    """A bar for each phase, divided into causes, under the two settings; a line where the card ends."""
    card = drawn["usable_gib"]
    with settings():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        panels = figure.subplots(len(drawn["gib"]), 1, sharex=True)
        for axes, (name, phases) in zip(panels, drawn["gib"].items(), strict=True):
            left = [0.0] * len(phases)
            for part, color in zip(PARTS, SERIES, strict=False):
                sizes = [parts[part] for parts in phases.values()]
                axes.barh(range(len(phases)), sizes, left=left, color=color, height=0.7, label=part)
                left = [before + size for before, size in zip(left, sizes, strict=True)]
            for row, total in enumerate(left):
                # A label that the dashed line would cross begins behind it.
                start = card if total <= card < total + LABEL else total
                axes.annotate(f"{total:.1f}", (start, row), (3, 0), textcoords="offset points", va="center", color=SOFT)
            axes.axvline(card, color=INK, linewidth=0.8, linestyle="--")
            axes.set_title(name, loc="left", fontsize=7, color=INK)
            name_rows(axes, list(phases))
        panels[-1].set_xlabel(f"GiB; dashed: what a card of {drawn['card']} GB has for the run")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, handlelength=1)
        about = (
            f"Memory of each phase, {drawn['model']}, {drawn['tokens']:,} tokens, under {' and '.join(drawn['gib'])}."
        )
        return to_svg(figure, about)


if __name__ == "__main__":
    main()
