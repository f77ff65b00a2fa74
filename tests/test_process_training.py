"""Advantages per token on their way to the loss: the loss TRL computes with them is TRL's own, and so is the step."""

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, RewardHealthCallback, Rewards
from grpo_plus.advantages import process_advantages
from grpo_plus.losses import LOSSES, register
from tests.close import assert_close, differing
from tests.training import OF_THE_SAMPLER, logs_of, make_trainer, stepwise, weights_of

LONGEST = 12
# Plain SGD: Adam divides near-zero gradients by their own size, and rounding would look like a difference.
SETTINGS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_completion_length": LONGEST,
    "num_iterations": 2,
    "max_steps": 2,
}


@pytest.fixture
def twin():
    """TRL's loss of that name under another, so that it takes our path."""

    def make(name: str) -> str:
        register(f"our_{name}", reduction=LOSSES[name].reduction)(LOSSES[name].function)
        return f"our_{name}"

    with LOSSES.temporarily():
        yield make


def wave(rows: int) -> Tensor:
    """(B, T) numbers of both signs, no two alike; wider than any completion."""
    return torch.arange(rows * (LONGEST + 3), dtype=torch.float64).sin().view(rows, -1)


class Stock(GRPOTrainer):
    """TRL's trainer with (B, T) advantages put in by hand, as TRL's loss documents."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows, tokens = output["completion_ids"].shape
        output["advantages"] = wave(rows)[:, :tokens].float()
        return output


class Ours(GRPOPlusTrainer):
    def estimate_advantages(self, rewards: Rewards) -> Tensor:
        return wave(8).view(2, 4, -1)


def trained(trainer: GRPOTrainer) -> GRPOTrainer:
    """Trains, and keeps the gradients of each micro-batch."""
    trainer.gradients = []
    original = trainer.accelerator.backward

    def backward(loss, **arguments):
        original(loss, **arguments)
        trainer.gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.accelerator.backward = backward
    trainer.train()
    return trainer


# TRL's own code computes each of them from the advantages; these use an advantage in ways of their own.
LEVELS = [("dapo", "token"), ("sapo", "token"), ("vespo", "token"), ("cispo", "token"), ("luspo", "sequence")]


@pytest.mark.parametrize(("loss", "level"), LEVELS)
def test_trls_losses_have_the_gradient_that_trl_gives_them(tmp_path, loss, level):
    config = {**SETTINGS, "loss_type": loss, "importance_sampling_level": level}
    config |= {"epsilon_high": 2.0} if loss == "cispo" else {}
    stock = trained(make_trainer(tmp_path / "stock", trainer_class=Stock, **config))
    padded = {"packing": "none", "skip_zero_advantage": False}
    ours = trained(make_trainer(tmp_path / "ours", trainer_class=Ours, config_class=GRPOPlusConfig, **padded, **config))
    assert len(ours.gradients) == len(stock.gradients) == 2
    for mine, theirs in zip(ours.gradients, stock.gradients, strict=True):
        assert sum(gradient.abs().sum() for gradient in theirs.values()) > 1e-3
        assert differing(theirs, mine) == []
    own = ("advantages/", *OF_THE_SAMPLER)
    without_ours = [{k: v for k, v in entry.items() if not k.startswith(own)} for entry in logs_of(ours)]
    assert without_ours == logs_of(stock)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "sapo", "luspo"])
def test_our_path_has_the_gradient_that_trl_gives_the_same_loss(tmp_path, twin, loss):
    stock = trained(make_trainer(tmp_path / "stock", trainer_class=Stock, loss_type=loss, **SETTINGS))
    arguments = {"trainer_class": Ours, "config_class": GRPOPlusConfig, "loss_type": twin(loss)}
    ours = trained(make_trainer(tmp_path / "ours", **arguments, **SETTINGS))
    for mine, theirs in zip(ours.gradients, stock.gradients, strict=True):
        for name, gradient in theirs.items():
            assert_close(name, mine[name], gradient, rtol=1e-4)


@pytest.mark.parametrize("loss", [name for name in LOSSES if LOSSES[name].origin == "grpo_plus"])
def test_a_loss_of_ours_trains_on_step_rewards(tmp_path, loss):
    arguments = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig, "loss_type": loss}
    trainer = make_trainer(
        tmp_path, advantage_estimator="process", reward_funcs=[stepwise], num_iterations=2, max_steps=2, **arguments
    )
    start = weights_of(trainer)
    trainer.train()
    assert differing(weights_of(trainer), start)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss for loss in losses if not math.isfinite(loss)] == []


def by_hand(step_rewards: list[list[float]], step_ends: list[list[int]], lengths: list[int]) -> list[list[float]]:
    """Each token's advantage in one group, from the paper's sentence: the sum of the normalized rewards of its own
    step and the later ones, normalized over the steps of all completions.
    """
    flat = [reward for row in step_rewards for reward in row]
    mean = sum(flat) / len(flat)
    std = (sum((reward - mean) ** 2 for reward in flat) / (len(flat) - 1)) ** 0.5
    return [
        [
            sum((reward - mean) / (std + 1e-4) for reward, end in zip(rewards, ends, strict=True) if end >= token)
            for token in range(length)
        ]
        for rewards, ends, length in zip(step_rewards, step_ends, lengths, strict=True)
    ]


def test_one_step_moves_the_weights_as_a_hand_computation_says(tmp_path):
    seen = []

    def graded(prompts, completion_ids, log_extra, **others):
        seen.extend(zip(prompts, completion_ids, strict=True))
        return stepwise(completion_ids, log_extra)

    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        advantage_estimator="process",
        reward_funcs=[graded],
        log_completions=True,
        loss_type="bnpo",
        max_grad_norm=1e9,
        trainer_arguments={"callbacks": [RewardHealthCallback(patience=1, dead_groups=1.0)]},
        **(SETTINGS | {"max_steps": 1, "num_iterations": 1, "max_completion_length": 64}),
    )
    model, start = trainer.model, weights_of(trainer)
    trainer.train()
    moved = weights_of(trainer)
    table = pd.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    lengths = [len(ids) for _, ids in seen]
    assert len(set(lengths)) > 1
    advantages: list[list[float]] = []
    for group in (slice(0, 4), slice(4, 8)):
        advantages += by_hand(table["step_rewards"][group].tolist(), table["step_ends"][group].tolist(), lengths[group])
    # The log holds the mean over the completion's tokens, and the metrics read the log.
    means = [sum(row) / len(row) for row in advantages]
    assert table["advantage"].tolist() == pytest.approx(means, abs=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["advantages/max_abs"] == pytest.approx(max(map(abs, means)), abs=1e-5)
    # bnpo right after generation: -sum of A log pi over all tokens, divided by their number.
    model.load_state_dict(start, strict=False)
    model.zero_grad()
    loss = torch.zeros(())
    for (prompt, ids), row in zip(seen, advantages, strict=True):
        prompt_ids = trainer.processing_class(prompt)["input_ids"]
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
        loss = loss - (torch.tensor(row) * logps).sum() / sum(lengths)
    loss.backward()
    steps = {name: -0.5 * parameter.grad for name, parameter in model.named_parameters()}
    assert max(step.abs().max() for step in steps.values()) > 1e-3
    for name, step in steps.items():
        torch.testing.assert_close(moved[name] - start[name], step, rtol=1e-3, atol=1e-6, msg=name)


def test_evaluation_takes_advantages_per_token_too(tmp_path):
    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        advantage_estimator="process",
        reward_funcs=[stepwise],
        num_generations_eval=2,
        per_device_eval_batch_size=16,  # more rows than TRL's log holds
        log_completions=True,
        trainer_arguments={"eval_dataset": make_trainer(tmp_path).train_dataset.select(range(8))},
    )
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


def twice(completion_ids, log_extra, **_):
    stepwise(completion_ids, log_extra)
    return stepwise(completion_ids, log_extra)


def too_far(completion_ids, log_extra, **_):
    log_extra("step_rewards", [[1.0]] * len(completion_ids))
    log_extra("step_ends", [[len(ids)] for ids in completion_ids])
    return [1.0] * len(completion_ids)


def only_rewards(completion_ids, log_extra, **_):
    log_extra("step_rewards", [[1.0]] * len(completion_ids))
    return [1.0] * len(completion_ids)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (twice, r"log_extra\('step_rewards', ...\) got 16 lists for 8 completions"),
        (too_far, r"Completion 0 has 8 tokens and step_ends \[8.0\]"),
        (only_rewards, r"call log_extra\('step_rewards', ...\) and log_extra\('step_ends', ...\)"),
    ],
)
def test_steps_that_cannot_be_used_stop_before_any_weight_moves(tmp_path, reward, message):
    arguments = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    trainer = make_trainer(tmp_path, advantage_estimator="process", reward_funcs=[reward], **arguments)
    start = weights_of(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert differing(weights_of(trainer), start) == []


def test_steps_and_an_outcome_add_up_in_an_overridden_hook(tmp_path):
    seen = []

    class Both(GRPOPlusTrainer):
        def estimate_advantages(self, rewards: Rewards) -> Tensor:
            assert rewards.steps is not None
            assert rewards.lengths is not None
            steps = process_advantages(
                rewards.steps.rewards.flatten(0, 1),
                rewards.steps.ends.flatten(0, 1),
                num_generations=4,
                num_tokens=int(rewards.lengths.max()),
            )
            seen.append(steps.view(2, 4, -1) + rewards.values[..., 1:])
            return seen[-1]

        def compute_loss(self, model, inputs, *arguments, **keywords):
            seen.append(inputs["advantages"])
            return super().compute_loss(model, inputs, *arguments, **keywords)

    def outcome(completions, **_):
        return [float(index) for index in range(len(completions))]

    trainer = make_trainer(tmp_path, trainer_class=Both, reward_funcs=[stepwise, outcome], max_steps=1)
    trainer.train()
    expected, reached = seen
    expected = expected.flatten(0, 1)[:, : reached.shape[1]].float()
    # TRL shuffles the rows of a batch.
    assert sorted(reached.tolist()) == [pytest.approx(row) for row in sorted(expected.tolist())]
