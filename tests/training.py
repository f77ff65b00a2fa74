"""Short GRPO trainings on the demo's tiny model, for comparing trainers and configurations."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

newest = partial(pytest.param, marks=pytest.mark.newest_trl)
NOT_REPRODUCIBLE = {"step_time", "rollout/tokens_per_second", "eval_rollout/tokens_per_second"} | {
    f"{mode}_{figure}" for mode in ("train", "eval") for figure in ("runtime", "samples_per_second", "steps_per_second")
}
# What the grouped loop says of itself in the log.
OF_THE_SAMPLER = (
    "sampling/sampling_logp_difference/",
    "sampling/importance_sampling_ratio/",
    "rollout/",
    "eval_rollout/",
)

PROMPTS = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(5)])


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A dense reward, so that no two completions of an untrained model tie for long."""
    return [0.7 * sum(letter in "aeiou" for letter in text) for text in completions]


def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-0.1 * len(text.split(" ")[0]) for text in completions]


def stepwise(completion_ids: list[list[int]], log_extra: Any, **_: Any) -> list[float]:
    """Steps of three tokens, the last one shorter; the last token's id decides a step's reward."""
    ends = [[*range(2, len(ids) - 1, 3), len(ids) - 1] for ids in completion_ids]
    rewards = [[ids[end] % 5 / 2 for end in row] for ids, row in zip(completion_ids, ends, strict=True)]
    log_extra("step_rewards", rewards)
    log_extra("step_ends", ends)
    return [sum(row) for row in rewards]


def make_trainer(
    output_dir: Path,
    *,
    trainer_class: type[GRPOTrainer] = GRPOTrainer,
    config_class: type[GRPOConfig] = GRPOConfig,
    reward_funcs: Any = (vowels, brevity),
    train_dataset: Dataset = PROMPTS,
    trainer_arguments: dict[str, Any] | None = None,
    model: PreTrainedModel | None = None,
    processing_class: ProcessorMixin | PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> GRPOTrainer:
    tokenizer = tiny_tokenizer()
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "seed": 7,
    }
    trainer = trainer_class(
        model=model or tiny_model(tokenizer, hidden_size=32, num_heads=2),
        reward_funcs=list(reward_funcs),
        args=config_class(**(defaults | config)),
        train_dataset=train_dataset,
        processing_class=processing_class or tokenizer,
        **(trainer_arguments or {}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def weights_of(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def logs_of(trainer: GRPOTrainer) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in entry.items() if k not in NOT_REPRODUCIBLE} for entry in trainer.state.log_history]
