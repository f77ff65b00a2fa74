"""Figures of a step are means over its tokens: what the log says, and what beta follows."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.training import logs_of, make_trainer, vowels

OURS: dict[str, Any] = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
LENGTHS = [2, 3, 2, 4, 9, 12, 10, 11]
ENDED = [True] * 4 + [False] * 4


def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
    """Completions of one group short and ended, of the other long and cut off."""
    tokenizer, made = trainer.processing_class, torch.Generator().manual_seed(3)
    ids = [torch.randint(5, 40, (length,), generator=made).tolist() for length in LENGTHS]
    for row, ended in zip(ids, ENDED, strict=True):
        row[-1] = tokenizer.eos_token_id if ended else 7
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[-1.0] * len(row) for row in ids],
    }


def numbered(completions: list[str], **_: Any) -> list[float]:
    return [float(row % 4) for row in range(len(completions))]


def trained(output_dir: Any, **config: Any) -> Any:
    adapter = LoraConfig(r=4, target_modules="all-linear")
    settings = OURS | {
        "reward_funcs": [numbered],
        "trainer_arguments": {"rollout_func": rollout, "peft_config": adapter},
        "num_iterations": 3,
        "max_completion_length": 16,
        "beta": 0.1,
    }
    trainer = make_trainer(output_dir, **(settings | config))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Stock figures where a step is one micro-batch."""
    return logs_of(trained(tmp_path_factory.mktemp("whole"), config_class=GRPOConfig, loss_type="dapo"))


def test_the_figures_of_two_micro_batches_are_those_of_the_step_in_one(tmp_path, whole):
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": "dapo"}
    logs = logs_of(trained(tmp_path, **halves))
    for entry, expected in zip(logs[:3], whole[:3], strict=True):
        for name in ("kl", "entropy", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-7), name
    assert logs[2]["kl"] > 0


def test_trls_own_log_stays_as_it_is_where_every_speed_up_is_off(tmp_path):
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    off = {"packing": "none", "skip_zero_advantage": False, "lora_backend": "peft", "logprob_backend": "trl"}
    plain = logs_of(trained(tmp_path / "stock", config_class=GRPOConfig, **halves))
    ours = logs_of(trained(tmp_path / "ours", **halves, **off))
    shared = [{k: v for k, v in mine.items() if k in theirs} for mine, theirs in zip(ours, plain, strict=True)]
    assert shared == plain


@pytest.mark.parametrize("packing", ["auto", "none"])
def test_beta_follows_the_tokens_of_the_step_and_not_a_micro_batch_without_any(tmp_path, packing):
    # The cut-off group has no scored token, and packing puts it last: its KL of 0 says nothing.
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "packing": packing}
    trainer = trained(tmp_path, mask_truncated_completions=True, kl_target=1e-9, kl_horizon=100, **settings)
    first, *others = (entry for entry in logs_of(trainer) if "kl" in entry)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert all(entry["kl"] > 1e-9 for entry in others)
    change = 0.2 * 8 / 100
    assert trainer.beta == pytest.approx(0.1 * (1 - change) * (1 + change) ** 2)
    vocabulary = trainer.model.get_base_model().config.vocab_size
    # An untrained model's entropy; half of it, if a micro-batch without a token counted as 0.
    assert first["entropy"] == pytest.approx(math.log(vocabulary), rel=0.2)


def test_a_step_without_any_token_logs_no_figure_of_tokens_and_leaves_beta(tmp_path):
    def cut_off(prompts: list[str], trainer: Any) -> dict[str, list]:
        return rollout(prompts, trainer) | {"completion_ids": [[7] * length for length in LENGTHS]}

    arguments = {"rollout_func": cut_off, "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    trainer = trained(tmp_path, mask_truncated_completions=True, kl_target=1e-9, trainer_arguments=arguments)
    assert trainer.beta == 0.1
    assert [name for entry in logs_of(trainer) for name in entry if name in ("kl", "entropy")] == []


def test_packing_counts_all_tokens_of_the_step(tmp_path):
    trainer = make_trainer(
        tmp_path,
        reward_funcs=[vowels],
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        advantage_estimator="ema_task",
        **OURS,
    )
    counted: list[tuple[int, int]] = []
    forwarded = trainer._step_figures.forwarded

    def spy(rows: Any, packed: Any, entropies: Any) -> None:
        counted.append((rows.input_ids.numel(), packed.tokens))
        forwarded(rows, packed, entropies)

    trainer._step_figures.forwarded = spy
    trainer.train()
    (padded, tokens) = (sum(column) for column in zip(*counted, strict=True))
    log = logs_of(trainer)[0]
    assert log["packing/token_ratio"] == pytest.approx(padded / tokens)
    assert log["advantages/scale"] > 0


def test_a_step_that_an_error_cut_off_leaves_nothing_in_the_figures_of_the_next_training(tmp_path):
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(tmp_path, reward_funcs=[vowels], **OURS, **halves)
    compute, calls = trainer.compute_loss, []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = compute(*args, **kwargs)
        if len(calls) == 1:
            trainer._step_figures.add("entropy", torch.full((1, 1), 1e6), torch.ones(1, 1))
            raise ZeroDivisionError
        return loss

    trainer.compute_loss = fails_once
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.train()
    assert logs_of(trainer)[0]["entropy"] < 10
