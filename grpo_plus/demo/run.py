"""The demo: a model that has only seen shuffled digits learns to sort them, from two rewards, on a CPU."""

import inspect
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
)

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.demo import task
from grpo_plus.demo.outputs import DemoResult, discard_earlier_run, draw_learning_curve, write_log, write_summary
from grpo_plus.demo.progress import HeldOutAccuracy, RewardsOnTheBar
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.demo.warmup import warm_up
from grpo_plus.qlora import QLoRA, save_merged
from grpo_plus.qlora import qlora as qlora_recipe
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu
from grpo_plus.trainer import GRPOPlusTrainer

MAX_STEPS = 120
WARM_UP_STEPS = 160
RANK, QLORA_LEARNING_RATE, MERGED = 32, 3e-3, "merged"
NUM_EXAMPLES, NUM_TRAIN, NUM_HELD_OUT, NUM_SHOWN = 4_000, 4_000, 500, 3

# 16 prompts x 8 completions a step on the CPU, in float32; nothing is reported or checkpointed.
SETTINGS: dict[str, Any] = {
    "num_generations": 8,
    "per_device_train_batch_size": 128,
    "max_completion_length": task.MAX_COMPLETION_LENGTH,
    "learning_rate": 6e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}

# TRL's own choices, which say how the rewards become a loss; the fields that grpo_plus adds come on top.
TRL_SWITCHES = ("loss_type", "scale_rewards", "multi_objective_aggregation", "beta", "num_iterations", "learning_rate")


@dataclass(frozen=True)
class Exam:
    """Accuracy on all held-out prompts, and the greedy completions of the first few."""

    accuracy: float
    completions: list[str]


def run_demo(
    output_dir: str | Path,
    *,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    warm_up_steps: int = WARM_UP_STEPS,
    advantage_estimator: str | None = None,
    loss_type: str = "dapo",
    qlora: bool = False,
) -> DemoResult:
    """Warm a tiny model up, train it with GRPO, and write model, log, learning curve and summary to `output_dir`.

    Args:
        qlora: train adapters on the warmed-up model in 4 bits, and export what they make of it without bitsandbytes.

    Raises:
        ImportError: `qlora` without bitsandbytes; raised before any work is done.
        ValueError: a value that the configuration refuses; raised before any work is done.
    """
    config = demo_config(output_dir, seed, max_steps, advantage_estimator, loss_type)
    recipe = qlora_recipe(r=RANK, alpha=RANK) if qlora else None
    if recipe is not None:
        config.learning_rate = QLORA_LEARNING_RATE
    with one_thread():
        return _run(config, Path(output_dir), warm_up_steps, recipe)


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small gains little from a second thread, and waits for it whenever the machine does other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(config: GRPOPlusConfig, output_dir: Path, warm_up_steps: int, recipe: QLoRA | None) -> DemoResult:
    directory = discard_earlier_run(output_dir)
    started = time.perf_counter()
    tokenizer = tiny_tokenizer()
    model = warmed_up_model(tokenizer, config.seed, warm_up_steps)
    held_out = task.dataset("held_out", NUM_HELD_OUT, config.seed)
    if recipe is not None:
        model = _quantized(model, recipe)
    before = _examine(model, tokenizer, held_out)
    trainer = demo_trainer(config, model, tokenizer, held_out, recipe)
    try:
        trainer.train()
    except SystemExit:  # SIGTERM has ended the training in good order, but there is no demo
        raise SystemExit(128 + signal.SIGTERM) from None
    if recipe is None:
        trainer.save_model()
        trained = model
    else:
        trained = _exported(trainer, tokenizer, held_out, directory)
    after = _examine(trained, tokenizer, held_out)

    log_history = trainer.state.log_history
    write_log(log_history, directory)
    draw_learning_curve(log_history, directory, accuracy_before=before.accuracy, title=config.describe())
    result = _result(config, before, after, held_out, recipe is not None, seconds=time.perf_counter() - started)
    write_summary(result, directory)
    return result


def warmed_up_model(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> PreTrainedModel:
    """A tiny model that writes four digits in brackets, in random order."""
    model = tiny_model(tokenizer, hidden_size=128, intermediate_size=256, num_heads=8, seed=seed)
    warm_up(model, tokenizer, task.format_examples(NUM_EXAMPLES, seed), steps=steps, seed=seed)
    return model


def demo_config(
    output_dir: str | Path, seed: int, max_steps: int, advantage_estimator: str | None, loss_type: str
) -> GRPOPlusConfig:
    """The demo's configuration; raises ValueError for a value that cannot be."""
    if max_steps < 1:
        raise ValueError(
            f"max_steps={max_steps} trains nothing. Set max_steps to 1 or more; the default is {MAX_STEPS}."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} cannot seed every generator. Choose a seed from 0 to 2**32 - 1.")
    return GRPOPlusConfig(
        output_dir=str(output_dir),
        seed=seed,
        max_steps=max_steps,
        advantage_estimator=advantage_estimator,
        loss_type=loss_type,
        log_completions=True,  # for `grpo-plus replay`
        num_completions_to_print=0,
        **SETTINGS,
    )


def demo_trainer(
    config: GRPOPlusConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Dataset,
    recipe: QLoRA | None,
) -> GRPOPlusTrainer:
    """The demo's trainer of a model that is warmed up."""
    trainer = GRPOPlusTrainer(
        model=model,
        reward_funcs=[task.correctness_reward, task.format_reward],
        args=config,
        train_dataset=task.dataset("train", NUM_TRAIN, config.seed),
        processing_class=tokenizer,
        peft_config=None if recipe is None else recipe.peft_config,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(HeldOutAccuracy(tokenizer, held_out))
    trainer.add_callback(RewardsOnTheBar())
    return trainer


def _quantized(model: PreTrainedModel, recipe: QLoRA) -> PreTrainedModel:
    """The model in 4 bits; transformers quantizes while it loads from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantized = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=recipe.quantization_config, dtype=torch.bfloat16
        )
    keep_gradients_on_the_cpu(quantized)
    return quantized


def _exported(
    trainer: GRPOPlusTrainer, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, directory: Path
) -> PreTrainedModel:
    """What the adapters have made of the base, saved without bitsandbytes and read back."""
    path = directory / MERGED
    shutil.rmtree(path, ignore_errors=True)
    answers = [
        prompt + task.COMPLETION.format(answer)
        for prompt, answer in zip(held_out["prompt"], held_out["answer"], strict=True)
    ]
    save_merged(trainer.model, path, tokenizer=tokenizer, input_ids=tokenizer(answers, return_tensors="pt").input_ids)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def _examine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Dataset) -> Exam:
    shown = task.complete(model, tokenizer, held_out["prompt"][:NUM_SHOWN])
    return Exam(task.accuracy(model, tokenizer, held_out), shown)


def _result(
    config: GRPOPlusConfig, before: Exam, after: Exam, held_out: Dataset, qlora: bool, seconds: float
) -> DemoResult:
    shown = zip(held_out["prompt"], before.completions, after.completions, strict=False)
    return DemoResult(
        accuracy_before=before.accuracy,
        accuracy_after=after.accuracy,
        seed=config.seed,
        steps=config.max_steps,
        seconds=round(seconds, 1),
        switches=switches(config) | {"qlora": qlora},
        examples=[{"prompt": prompt, "before": first, "after": last} for prompt, first, last in shown],
    )


def switches(config: GRPOPlusConfig) -> dict[str, Any]:
    """Every field that GRPOPlusConfig adds to TRL's, and TRL's own that decide how rewards become a loss."""
    names = (*inspect.get_annotations(GRPOPlusConfig), *TRL_SWITCHES)
    return {name: getattr(config, name) for name in names}
