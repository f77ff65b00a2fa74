"""The planner's prediction against measured peaks, whole steps, and tokens of generation."""

import contextlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import Any

import torch

from benchmarks import memory
from benchmarks.gpu.gauges import clean, profile
from benchmarks.gpu.record import Setting, Stage
from benchmarks.gpu.updates import real
from benchmarks.memory_run import TINY, TRL_DEFAULT, TRL_TUNED, Case, make_trainer, random_model
from grpo_plus import StepProfile
from grpo_plus.planner import QLORA, Run
from grpo_plus.trainer.rollouts.generation import generating

LENGTHS: dict[str, Any] = {"prompt_length": 1024, "max_completion_length": 64}
LORA: dict[str, Any] = LENGTHS | {"dtype": "bfloat16", "lora_r": 16}
RECIPE: dict[str, Any] = LENGTHS | QLORA
# Model, name, settings, and whether TRL's own trainer runs them.
PLANNED: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("Qwen3-1.7B", "recipe", RECIPE, False),
    ("Qwen3-1.7B", "recipe, padded rows", RECIPE | {"packing": "none"}, False),
    ("Qwen3-1.7B", "LoRA in bf16", LORA, False),
    ("Qwen3-1.7B", "LoRA in bf16, no checkpointing", LORA | {"gradient_checkpointing": False}, False),
    ("Qwen3-4B", "recipe", RECIPE, False),
    ("Qwen3-4B", "recipe, no checkpointing", RECIPE | {"gradient_checkpointing": False}, False),
    ("Qwen3-4B", "TRL's defaults in nf4", LENGTHS | TRL_DEFAULT, True),
    ("Qwen3-4B", "TRL, tuned", LENGTHS | TRL_TUNED, True),
    ("Qwen3-4B", "recipe, 2 x 8 rows, reference", RECIPE | {"gradient_accumulation_steps": 2, "beta": 0.04}, False),
    ("Qwen3-4B", "recipe, long prompt", RECIPE | {"prompt_length": 4096, "max_completion_length": 32}, False),
    ("Qwen3-1.7B", "full, bf16", LENGTHS | {"dtype": "bfloat16"}, False),
    ("Qwen3-8B", "recipe", RECIPE, False),
)
TOGETHER = 5  # processes; a peak is of one process, a context is not


def planner(stage: Stage, setting: Setting) -> None:
    """Measure each run in a process of its own, several at a time."""
    cases = [
        (model, name, Case(real(setting, model), Run(**run), setting.device, None, stock))
        for model, name, run, stock in PLANNED
    ]
    if setting.tiny:
        cases = [("tiny", name, Case(TINY, run, "cpu", None, stock)) for name, (run, stock) in memory.TINY_RUNS.items()]
    pool = ThreadPoolExecutor(1 if setting.tiny else TOGETHER)
    try:
        futures = [(f"{model} {name}", pool.submit(memory.compare, model, name, case)) for model, name, case in cases]
        for label, future in futures:
            while not future.done():  # so that the deadline is seen
                time.sleep(0.2)
            row = stage.item(label, lambda future=future: {"raw": future.result()}, quiet=True)  # type: ignore[misc]
            found = [f"{r['phase']} {r['error']:+.1%}" if "phase" in r else r["error"] for r in row.get("raw", [])]
            stage.record.say(f"  {label}: {', '.join(found)}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    rows = [entry for row in stage.rows for entry in row.get("raw", []) if "phase" in entry]
    if rows:
        stage.record.say(f"  largest phases within 10 %: {memory.within(rows, 0.1)}")


def step(stage: Stage, setting: Setting) -> None:
    """Whole steps with transformers' generate, and what a token of eight rows costs."""
    dtype = {"dtype": "float32", "bf16": False} if setting.tiny else {"dtype": "bfloat16"}
    lengths = (
        {"prompt_length": 24, "max_completion_length": 8}
        if setting.tiny
        else {"prompt_length": 512, "max_completion_length": 128}
    )
    lora, recipe = Run(**LORA | dtype | lengths), Run(**RECIPE | dtype | lengths)
    stage.item("Qwen3-1.7B LoRA, ours", _step, setting, "Qwen3-1.7B", lora, False)
    stage.item("Qwen3-1.7B LoRA, stock TRL", _step, setting, "Qwen3-1.7B", lora, True)
    for held in (False, True):
        stage.item(f"tokens, 1.7B LoRA, {'ours' if held else 'PEFT'}", _tokens, setting, "Qwen3-1.7B", lora, held)
    if setting.tiny:
        return
    stage.item("Qwen3-4B QLoRA, ours", _step, setting, "Qwen3-4B", recipe, False)
    for held in (False, True):
        stage.item(f"tokens, 4B nf4 LoRA, {'ours' if held else 'PEFT'}", _tokens, setting, "Qwen3-4B", recipe, held)
    chunks = replace(recipe, generation_chunk_size=4)
    stage.item("Qwen3-4B QLoRA, ours, chunks of 4", _step, setting, "Qwen3-4B", chunks, False)


def _trainer(setting: Setting, name: str, run: Run, stock: bool, folder: str) -> Any:
    torch.manual_seed(0)
    config = real(setting, name)
    return make_trainer(
        folder, random_model(config, run, setting.device), Case(config, run, setting.device, None, stock)
    )


def _step(setting: Setting, name: str, run: Run, stock: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(StringIO()):
        trainer = _trainer(setting, name, run, stock, folder)
        trainer.add_callback(StepProfile(trainer))
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "profile/update_s" in entry]
    phases = ("generate_s", "score_s", "update_s")
    row: dict[str, Any] = {phase: round(logged[-1][f"profile/{phase}"], 3) for phase in phases}
    row["generate_share"] = round(row["generate_s"] / max(1e-9, sum(row.values())), 3)
    row["first_step"] = {phase: round(logged[0][f"profile/{phase}"], 3) for phase in phases}
    del trainer
    clean()
    return row


def _generate(trainer: Any, ids: torch.Tensor, new: int) -> None:
    with torch.no_grad(), generating(trainer), trainer.accelerator.autocast():
        arguments = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        trainer.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)


def _tokens(setting: Setting, name: str, run: Run, held: bool) -> dict[str, Any]:
    """A token of eight rows: milliseconds and launches, and how busy the device is."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(setting, name, run, False, folder)
    tokens = 3 if setting.tiny else 16
    ids = torch.randint(5, 90, (8, run.prompt_length), device=setting.device)
    seen = {}
    for new in (1, tokens):
        call = partial(_generate, trainer, ids, new)
        with contextlib.ExitStack() as scope:
            if held:
                scope.enter_context(trainer.speed.around_training(trainer.model))
                scope.enter_context(trainer.speed.adapters.held())
                call()
            seen[new] = profile(setting, call)
    del trainer
    clean()
    return {
        "ms_per_token": round((seen[tokens]["wall_ms"] - seen[1]["wall_ms"]) / (tokens - 1), 3),
        "launches_per_token": round((seen[tokens]["launches"] - seen[1]["launches"]) / (tokens - 1), 1),
        "busy": seen[tokens]["busy"],
        "kernels": seen[tokens]["kernels"],
    }
