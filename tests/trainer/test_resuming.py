"""A run that stops after any optimizer step goes on as if it had not: weights, log, tables and memory, bit for bit."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from tests.close import differing
from tests.training import PROMPTS, logs_of, make_trainer, vowels, weights_of

STEPS = 5


def short(completions: list[str], **_: Any) -> list[float]:
    """A reward from 0 to 1."""
    return [len(text) % 3 / 2 for text in completions]


def vowels_of_odd_sums(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Prompts that begin with an even number are dead."""
    rewards = vowels(completions)
    return [reward * (int(prompt[0]) % 2) for prompt, reward in zip(prompts, rewards, strict=True)]


# One generation batch lasts for four optimizer steps, in two of which nothing is generated.
REUSED = {"num_iterations": 2, "steps_per_generation": 2}
EVERY_STEP = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": STEPS,
    "log_completions": True,
    "max_completion_length": 4,
}
TASK = {"task_column": "answer"}

CASES: dict[str, dict[str, Any]] = {
    "num_iterations": {"num_iterations": 2},
    "steps_per_generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "unaligned": {"steps_per_generation": 2, "gradient_accumulation_steps": 3},
    "logging_steps": REUSED | {"logging_steps": 3},
    "plain config": REUSED | {"config_class": GRPOConfig},
    "moved reference": REUSED
    | {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6},
    "kl_target": REUSED | {"beta": 0.1, "kl_target": 0.01},
    "kl in the reward": REUSED
    | {"beta": 0.1, "kl_target": 0.01, "advantage_estimator": "rloo", "advantage_modifiers": {"kl_in_reward": {}}},
    "ema_task": REUSED | TASK | {"advantage_estimator": "ema_task"},
    "popart": REUSED | TASK | {"advantage_estimator": "popart"},
    "truncated sampling": REUSED | {"top_p": 0.7, "truncated_sampling": "correct"},
    "refills": REUSED | {"max_refills": 1, "advantage_estimator": "rloo", "demonstration_column": "answer"},
    "groups of older batches": REUSED
    | {"refill_buffer": 1, "advantage_estimator": "rloo", "reward_funcs": [vowels_of_odd_sums], "temperature": 2.0},
    "prompts by pass rate": REUSED
    | {"prompt_sampler": {"pass_rate": {"reward": "vowels"}}, "max_refills": 1, "advantage_estimator": "rloo"},
    "adaptive entropy": REUSED | {"use_adaptive_entropy": True, "entropy_target": 1.0},
    "loss of ours": REUSED | {"loss_type": "gmpo"},
    "lora": REUSED | {"lora": True},
    "spo": REUSED | {"advantage_estimator": "spo", "reward_funcs": [short]},
    # Three steps make an epoch, and every epoch has an order of its own.
    "epochs": {"train_dataset": PROMPTS.select(range(3))},
    "stream": REUSED | {"train_dataset": PROMPTS.to_iterable_dataset()},
    "epochs of a stream": {"train_dataset": PROMPTS.select(range(3)).to_iterable_dataset(), "num_train_epochs": 2},
}

# How far the run is within its generation batch, or within its rows, is another state after each step.
WHERE_THE_STEP_COUNTS = ("steps_per_generation", "unaligned", "moved reference", "epochs", "epochs of a stream")


def saved_base(folder: Path) -> Path:
    tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The model in a folder: TRL loads the reference from there."""
    folder = tmp_path_factory.mktemp("base")
    return saved_base(folder)


def made(folder: Path, base: Path, **config: Any) -> GRPOPlusTrainer:
    adapter = LoraConfig(r=4, target_modules="all-linear") if config.pop("lora", False) else None
    return make_trainer(
        folder,
        trainer_class=GRPOPlusTrainer,
        model=AutoModelForCausalLM.from_pretrained(base),
        trainer_arguments={"peft_config": adapter},
        **EVERY_STEP | {"per_device_train_batch_size": 4, "config_class": GRPOPlusConfig} | config,
    )


def trained(folder: Path, base: Path, resume: Path | None = None, **config: Any) -> GRPOPlusTrainer:
    trainer = made(folder, base, **config)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def figures_of(trainer: GRPOPlusTrainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in ("train_loss", "total_flos")} for entry in logs_of(trainer)]


def tables_of(folder: Path) -> dict[str, Any]:
    return {path.name: pd.read_parquet(path).to_dict() for path in (folder / "completions").glob("*.parquet")}


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumes_from_any_step_to_the_same_run(tmp_path, base, name):
    whole = trained(tmp_path / "whole", base, **CASES[name])
    for step in (1, 3) if name in WHERE_THE_STEP_COUNTS else (3,):
        folder = tmp_path / f"from-{step}"
        resumed = trained(folder, base, tmp_path / f"whole/checkpoint-{step}", **CASES[name])
        assert differing(weights_of(resumed), weights_of(whole)) == [], step
        assert figures_of(resumed) == figures_of(whole), step
        assert tables_of(folder).items() <= tables_of(tmp_path / "whole").items(), step
        assert resumed.estimator_state == whole.estimator_state
        assert resumed.beta == whole.beta


def test_a_run_that_has_ended_trains_no_further_step(tmp_path, base):
    """Killed after its last checkpoint. transformers would take one more step before it looks at max_steps."""
    whole = trained(tmp_path / "whole", base, **REUSED)
    resumed = trained(tmp_path / "resumed", base, tmp_path / f"whole/checkpoint-{STEPS}", **REUSED)
    assert resumed.state.global_step == STEPS
    assert differing(weights_of(resumed), weights_of(whole)) == []
    assert figures_of(resumed) == figures_of(whole)
