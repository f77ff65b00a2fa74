"""The GSM8K recipes as `grpo-plus train` reads them, and the memory that the planner expects of each."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from grpo_plus import GRPOPlusConfig
from grpo_plus.cli.arguments import parse
from grpo_plus.planner import MemoryPlan, Run, parse_bytes, plan, shape_of
from grpo_plus.planner.constants import GIB
from tests.planner.configs import LLAMA_3_2_3B, QWEN3_1_7B, QWEN3_4B

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
NAMES = ("gsm8k_8gb.yaml", "gsm8k_12gb.yaml", "gsm8k_16gb.yaml", "gsm8k_24gb.yaml")
MODELS = {
    "Qwen/Qwen3-1.7B": QWEN3_1_7B,
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_3_2_3B,
    "Qwen/Qwen3-4B": QWEN3_4B,
}
PROMPT = 512  # tokens to plan for


@cache
def read(name: str) -> tuple[Any, ...]:
    """Our own, the script's, the model's, the mixture's and the training's arguments."""
    return parse("train", ["--config", str(RECIPES / name), "--use_cpu"], GRPOPlusConfig)


def run_of(model: Any, config: GRPOPlusConfig) -> Run:
    """What decides the memory. The planner takes adapters to be on all linear layers."""
    assert model.use_peft
    assert model.lora_target_modules == "all-linear"
    given = {entry.name: getattr(source, entry.name) for source in (model, config) for entry in fields(Run)
             if hasattr(source, entry.name)}  # fmt: skip
    return Run(**given | {"prompt_length": PROMPT, "optim": str(config.optim.value)})


def planned(name: str, model: str | None = None, **changed: Any) -> MemoryPlan:
    """The plan of a recipe, for its own model or another one."""
    _, _, models, _, config = read(name)
    run = run_of(models, config)
    return plan(shape_of(MODELS[model or models.model_name_or_path]), Run(**vars(run) | changed))


def card_of(name: str) -> int:
    """Bytes of the card that a recipe is for."""
    return parse_bytes(name.removesuffix(".yaml").partition("_")[2])


def rows() -> list[tuple[str, ...]]:
    """One row per recipe: its settings, and the planned peak with each model."""
    header = ("recipe", "base", "completions a step", "longest", *(name.partition("/")[2] for name in MODELS))
    return [header, *map(_row, NAMES)]


def _row(name: str) -> tuple[str, ...]:
    own, _, model, _, config = read(name)
    base = "4 bits" if own.qlora else "bfloat16"
    completions = config.per_device_train_batch_size * config.gradient_accumulation_steps
    groups = f"{completions // config.num_generations} x {config.num_generations}"
    cells = [_peak(name, other, own=other == model.model_name_or_path) for other in MODELS]
    return (f"[{name}]({name})", base, groups, f"{config.max_completion_length:,} tokens", *cells)


def _peak(name: str, model: str, *, own: bool) -> str:
    plan = planned(name, model)
    if not plan.fits(card_of(name)):
        return "does not fit"
    peak = f"{plan.peak / GIB:.1f} GiB"
    return f"**{peak}**" if own else peak
