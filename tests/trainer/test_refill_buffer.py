"""Groups of earlier batches in the place of dead ones: with exact importance ratios, each once, none too old."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.trainer.batches.refill_buffer import Group, Held, RefillBuffer, joined, split
from grpo_plus.trainer.names import PADDING, REFILL_AGE, logged_columns
from tests.advantages.cases import rewards_of
from tests.close import assert_close
from tests.training import PROMPTS, make_trainer, weights_of

REWARDS = [0.0, 1.0, 3.0, 0.0]
ADVANTAGES = [-4 / 3, 0.0, 8 / 3, -4 / 3]  # 4/3 times the distance from the mean, 1


def dead_later(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """The second group of every batch but the first one is dead."""
    rewards = REWARDS * 2
    return rewards if trainer_state.global_step == 0 else [*rewards[:4], 1.0, 1.0, 1.0, 1.0]


class Recorder(GRPOPlusTrainer):
    """Keeps each micro-batch with the model that met it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.met = [*getattr(self, "met", []), (dict(inputs), weights_of(self))]
        return super().compute_loss(model, inputs, *args, **kwargs)


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.last = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def plain_model(weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model without anything of TRL's."""
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
    model.load_state_dict(weights, strict=False)  # the head is the embedding
    return model


def logps_of(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """(B, T) by the model's own forward."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    start = inputs["prompt_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, start:].unsqueeze(-1)).squeeze(-1)


def rows_of(inputs: dict[str, Any], chosen: Tensor) -> set[tuple[int, ...]]:
    """The completions of some rows."""
    ids, mask = inputs["completion_ids"][chosen].tolist(), inputs["completion_mask"][chosen].sum(1).tolist()
    return {tuple(row[:length]) for row, length in zip(ids, mask, strict=True)}


@pytest.mark.parametrize("packing", ["none", "auto"])
def test_an_older_group_trains_with_the_ratio_to_the_policy_that_sampled_it(tmp_path, packing):
    trainer = make_trainer(
        tmp_path,
        trainer_class=Recorder,
        config_class=GRPOPlusConfig,
        train_dataset=PROMPTS.to_iterable_dataset(),
        reward_funcs=[dead_later],
        advantage_estimator="rloo",
        refill_buffer=1,
        packing=packing,
        max_steps=2,
        max_grad_norm=0.0,
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    (first, sampled_by), (inputs, met_by) = trainer.met
    sampler, policy = plain_model(sampled_by), plain_model(met_by)
    old, mask = inputs[REFILL_AGE] == 1, inputs["completion_mask"]
    assert inputs[REFILL_AGE].sort().values.tolist() == [0.0] * 4 + [1.0] * 4
    for age in (old, ~old):
        assert sorted(inputs["advantages"][age].tolist()) == pytest.approx(sorted(ADVANTAGES), abs=1e-6)
    assert rows_of(inputs, old) <= rows_of(first, first[REFILL_AGE] == 0)

    # By hand, with the weights of both steps and nothing of the trainer's.
    logps = logps_of(policy, inputs)
    sampled = torch.where(old.unsqueeze(1), logps_of(sampler, inputs), logps).detach()
    assert_close("old log-probabilities", inputs["old_per_token_logps"] * mask, sampled * mask, rtol=1e-6)
    ratio, advantages = (logps - sampled).exp(), inputs["advantages"].unsqueeze(1)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-(surrogate * mask).sum() / mask.sum()).backward()
    for name, weight in policy.named_parameters():
        assert_close(name, gradients.last[name], weight.grad, rtol=1e-5)

    logged = next(entry for entry in trainer.state.log_history if entry["step"] == 2)
    trained = old & (inputs["advantages"] != 0)  # the others do not go through the model
    moved = ratio[trained][mask[trained] > 0].mean().item()
    assert abs(moved - 1) > 1e-3
    assert logged["sampling/buffered_ratio"] == pytest.approx(moved, abs=1e-5)
    assert (logged["sampling/buffered_groups"], logged["sampling/buffered_age"]) == (0.5, 1.0)
    assert logged["sampling/dead_groups"] == 0
    table = {name: list(column) for name, column in logged_columns(trainer).items()}
    assert table["rewards", "dead_later"] == REWARDS * 2
    assert table["advantages",] == pytest.approx(ADVANTAGES * 2, abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"top_p": 0.7, "truncated_sampling": "correct"},
        {"beta": 0.1, "advantage_estimator": None},
    ],
    ids=["truncated sampling", "reference, TRL's advantages"],
)
def test_under_a_policy_that_stands_still_every_older_group_has_a_ratio_of_1(tmp_path, config):
    defaults = {"advantage_estimator": "rloo", "learning_rate": 1e-30}
    adapters = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if config.get("beta") else {}
    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        reward_funcs=[dead_later],
        refill_buffer=1,
        trainer_arguments=adapters,
        **defaults | config,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if entry.get("sampling/buffered_groups")]
    assert [entry["sampling/buffered_ratio"] for entry in logged] == pytest.approx([1.0] * 2, abs=1e-6)
    if config.get("beta"):
        assert [entry["kl"] for entry in logged] == pytest.approx([0.0] * 2, abs=1e-6)


def test_a_group_that_no_update_has_seen_comes_before_the_newest(tmp_path):
    calls: list[list[str]] = []

    def judge(completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        # The second group is dead, but in the second batch, which refills the first one.
        return [*REWARDS, *(REWARDS if len(calls) == 2 else [1.0] * 4)]

    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        reward_funcs=[judge],
        advantage_estimator="rloo",
        max_refills=1,
        refill_buffer=1,
        max_steps=2,
    )
    trainer.train()
    _, refill, second = calls
    assert list(logged_columns(trainer)["completion",]) == [*second[:4], *refill[4:]]
    assert [entry.get("sampling/refills") for entry in trainer.state.log_history[:2]] == [1.0, 0.0]


def batch(numbers: list[int], width: int = 3) -> dict[str, Tensor]:
    """A row per number, of as many tokens, after a prompt of two."""
    mask = torch.tensor([[1] * number + [0] * (width - number) for number in numbers])
    prompts = torch.tensor([[0, 0, 5, 6]] * len(numbers))
    return {
        "prompt_ids": prompts,
        "prompt_mask": (prompts > 0).long(),
        "completion_ids": mask * 7,
        "completion_mask": mask,
        "old_per_token_logps": mask * -0.5,
        "advantages": torch.tensor(numbers).float(),
        REFILL_AGE: torch.zeros(len(numbers)),
    }


def held(buffer: RefillBuffer, *numbers: int, trained: bool) -> None:
    """Add a group of two rows for each number."""
    rows = batch([number for number in numbers for _ in range(2)])
    rewards = rewards_of([[float(number), 0.0] for number in numbers])
    flags = torch.ones(len(numbers), dtype=torch.bool)
    log = {("completion",): [f"{number}{half}" for number in numbers for half in "ab"]}
    buffer.add(split(rows, rewards, log, flags, flags & trained, buffer.held.batch))


def numbers(groups: list[Group]) -> list[tuple[float, float]]:
    """The number of each group and its age."""
    return [(group.rewards.values[0, 0, 0].item(), group.rows[REFILL_AGE][0].item()) for group in groups]


def test_groups_that_no_update_has_seen_come_first_and_then_the_newest_and_each_once():
    buffer = RefillBuffer(2)
    columns = batch([1]).keys()
    buffer.next_batch()
    held(buffer, 1, 2, trained=True)
    held(buffer, 3, trained=False)
    assert buffer.take(9, columns) == []  # a group of the batch itself is there already
    buffer.next_batch()
    held(buffer, 1, trained=True)
    buffer.next_batch()
    assert numbers(buffer.take(3, columns)) == [(3, 2), (1, 1), (1, 2)]
    assert buffer.take(1, columns - {"tool_mask"} | {"ref_per_token_logps"}) == []
    assert numbers(buffer.take(9, columns)) == [(2, 2)]
    held(buffer, 2, trained=True)
    for _ in range(3):
        buffer.next_batch()
    assert buffer.held.groups == ()


def test_groups_leave_their_padding_and_come_back_with_as_much_as_they_need():
    buffer = RefillBuffer(1)
    buffer.next_batch()
    held(buffer, 1, 2, trained=True)
    assert [group.rows["completion_ids"].shape for group in buffer.held.groups] == [(2, 1), (2, 2)]
    state = Held.state(buffer.held)
    buffer.load(state)
    buffer.next_batch()
    rows, rewards, log = joined(buffer.take(2, batch([1]).keys()), PADDING)
    expected = batch([1, 1, 2, 2], width=2)
    for name, values in rows.items():
        wanted = expected[name] if not name.startswith("prompt") else expected[name][:, 2:]
        assert torch.equal(values, wanted if name != REFILL_AGE else torch.ones(4)), name
    assert rewards.values[..., 0].tolist() == [[1, 0], [2, 0]]
    assert log == {("completion",): ["1a", "1b", "2a", "2b"]}
