"""Reward functions that judge beside the rest of a step: the same training, and proof that nobody waits."""

import asyncio
import logging
import threading
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.names import table_of
from grpo_plus.trainer.rewards.calls import RewardFunctionError
from tests.training import PROMPTS, brevity, logs_of, make_trainer, vowels, weights_of

WAIT = 20.0  # seconds, for what happens at once unless the code is wrong


def made(folder: Any, *functions: Any, trainer_class: Any = GRPOPlusTrainer, **config: Any) -> Any:
    return make_trainer(
        folder,
        trainer_class=trainer_class,
        config_class=GRPOPlusConfig,
        reward_funcs=functions,
        **({"max_steps": 1, "overlap_rewards": "groups"} | config),
    )


def logging_judge(completions: list[str], answer: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[Any]:
    log_extra("first", [text[:1] for text in completions])
    log_metric("length", sum(map(len, completions)) / len(completions))
    rewards: list[Any] = vowels(completions)
    return [None if value == "3" else reward for value, reward in zip(answer, rewards, strict=True)]


async def server(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
    await asyncio.sleep(0)
    log_extra("last", [text[-1:] for text in completions])
    return brevity(completions)


def trained(folder: Any, **config: Any) -> tuple[Any, ...]:
    """Log, table, weights and random state of a run with all that may come between: passes, refills, evaluations."""
    adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear"), "eval_dataset": PROMPTS.select(range(2))}
    trainer = made(
        folder,
        logging_judge,
        server,
        trainer_arguments=adapter,
        max_steps=2,
        num_iterations=2,
        beta=0.1,
        generation_chunk_size=6,
        max_refills=1,
        eval_strategy="steps",
        eval_steps=2,
        log_completions=True,
        **config,
    )
    trainer.train()
    return logs_of(trainer), table_of(trainer), list(weights_of(trainer).values()), torch.get_rng_state()


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), overlap_rewards=None)


@pytest.mark.parametrize("way", ["batch", "groups", {"server": "groups"}], ids=str)
def test_the_run_is_the_same(tmp_path, capsys, in_turn, way):
    log, table, weights, state = trained(tmp_path, overlap_rewards=way)
    assert log == in_turn[0]
    assert table == in_turn[1]
    assert all(map(torch.equal, weights, in_turn[2]))
    assert torch.equal(state, in_turn[3])
    assert "length" in log[0]
    assert set(table["extra"]) == {"first", "last"}
    capsys.readouterr()


class HandShake:
    """A judge and a model that wait for each other, which only works side by side."""

    def __init__(self) -> None:
        self.judging, self.went_on = threading.Event(), threading.Event()
        self.judged: list[str] = []

    def judge(self, completions: list[str], **_: Any) -> list[float]:
        self.judged.extend(completions)
        self.judging.set()
        assert self.went_on.wait(WAIT)
        return vowels(completions)

    async def judge_async(self, completions: list[str], **_: Any) -> list[float]:
        return await asyncio.to_thread(self.judge, completions)

    def forward(self, trainer: Any, *_: Any) -> None:
        """The model's forward."""
        if trainer._overlap._calls:
            assert self.judging.wait(WAIT)
            self.went_on.set()


@pytest.mark.parametrize("kind", ["judge", "judge_async"])
@pytest.mark.parametrize(
    ("way", "config"),
    [
        ("groups", {"generation_chunk_size": 4, "generation_loop": "trl"}),
        # Rows end after five tokens or so. The first whole group is judged while the other goes on.
        (
            "groups",
            {"max_completion_length": 64, "generation_kwargs": {"sequence_bias": [[[2], 3.0]]}},
        ),
        ("batch", {"num_iterations": 2, "steps_per_generation": 2}),
    ],
    ids=["the next part is generated", "the other rows go on", "the old policy's pass"],
)
def test_a_judge_works_while(tmp_path, kind, way, config):
    hands = HandShake()
    trainer = made(tmp_path, getattr(hands, kind), overlap_rewards=way, **config)
    trainer.model.register_forward_pre_hook(partial(hands.forward, trainer))
    trainer.train()
    assert hands.went_on.is_set()
    assert len(hands.judged) == 8 * config.get("steps_per_generation", 1)  # none is judged anew


def test_functions_judge_beside_each_other(tmp_path):
    meeting = threading.Barrier(3)

    def first(completions: list[str], **_: Any) -> list[float]:
        meeting.wait(WAIT)
        return vowels(completions)

    def second(completions: list[str], **_: Any) -> list[float]:
        meeting.wait(WAIT)
        return brevity(completions)

    async def third(completions: list[str], **_: Any) -> list[float]:
        await asyncio.to_thread(meeting.wait, WAIT)
        return brevity(completions)

    made(tmp_path, third, first, second, overlap_rewards="batch").train()


def test_a_call_has_the_arguments_of_trls(tmp_path):
    calls = []

    def judge(log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
        calls.append(columns)
        return vowels(columns["completions"])

    for way in (None, "batch", "groups"):
        made(tmp_path, judge, overlap_rewards=way).train()
    in_turn, batch, *groups = calls
    assert batch.pop("trainer_state").global_step == in_turn.pop("trainer_state").global_step
    assert batch == in_turn
    assert [group.pop("trainer_state").max_steps for group in groups] == [1, 1]
    assert {name: [*groups[0][name], *groups[1][name]] for name in in_turn} == in_turn


def test_what_groups_log_stands_in_the_order_of_the_rows(tmp_path):
    second_is_done = threading.Event()

    def judge(completions: list[str], prompts: list[str], log_extra: Any, **_: Any) -> list[float]:
        is_first = prompts[0] == first_prompt
        if is_first:
            assert second_is_done.wait(WAIT)
        log_extra("text", completions)
        if not is_first:
            second_is_done.set()
        return vowels(completions)

    trainer = made(tmp_path, judge, log_completions=True)
    first_prompt = next(iter(trainer.get_train_dataloader()))[0]["prompt"]
    trainer.train()
    table = table_of(trainer)
    assert list(table["extra"]["text"]) == list(table["completion"])


def broken(**_: Any) -> Any:
    return {}["b"]


async def broken_async(**_: Any) -> Any:
    return {}["b"]


def forgetful(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def hanging(**_: Any) -> Any:
    threading.Event().wait(WAIT)


async def hanging_async(**_: Any) -> Any:
    await asyncio.sleep(WAIT)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (broken, "'broken' raised KeyError: 'b'"),
        (broken_async, "'broken_async' raised KeyError: 'b'"),
        (forgetful, "'forgetful' returned 3 rewards for 4 completions"),
        (hanging, "'hanging' has not returned after reward_timeout=0.2 seconds"),
        (hanging_async, "'hanging_async' has not returned after reward_timeout=0.2 seconds"),
    ],
)
def test_what_goes_wrong_beside_the_step_names_the_function(tmp_path, function, message):
    trainer = made(tmp_path, vowels, function, reward_timeout=0.2)
    with pytest.raises((RewardFunctionError, ValueError), match=f"The reward function {message}"):
        trainer.train()
    assert trainer.reward_funcs[1] is function
    assert trainer._overlap._inputs == []


@pytest.mark.parametrize("column", ["more", "answer"])
def test_a_call_that_trl_makes_otherwise_is_made_anew(tmp_path, caplog, column):
    seen = []

    def judge(completions: list[str], **columns: Any) -> list[float]:
        seen.append((len(completions), columns.get(column) == [1] * 8))
        return vowels(completions)

    class Changing(GRPOPlusTrainer):
        def _calculate_rewards(self, inputs, *arguments):
            return super()._calculate_rewards([row | {column: 1} for row in inputs], *arguments)

    trainer = made(tmp_path, judge, trainer_class=Changing, overlap_rewards="batch")
    with caplog.at_level(logging.INFO, "grpo_plus"):
        trainer.train()
    assert sorted(seen) == [(8, False), (8, True)]
    assert "'judge' judges 8 completions anew" in caplog.text


def test_a_function_that_changes_its_arguments_is_called_once(tmp_path):
    seen = []

    def judge(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        seen.append(len(completions))
        rewards = vowels(completions)
        completions[:], answer[:] = ["changed"] * len(answer), [""] * len(answer)
        return rewards

    trainer = made(tmp_path, judge, log_completions=True)
    trainer.train()
    assert seen == [4, 4]
    table = table_of(trainer)
    assert list(table["rewards"]["judge"]) == pytest.approx(vowels(list(table["completion"])))


def given(prompts: list[str], trainer: Any) -> dict[str, Any]:
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": ids, "logprobs": None, "word": ["more"] * len(prompts)}


def test_columns_of_a_rollout_function_are_waited_for(tmp_path, caplog):
    seen = []

    def judge(completions: list[str], word: list[str], **_: Any) -> list[float]:
        seen.append(word)
        return vowels(completions)

    trainer = made(tmp_path, judge, trainer_arguments={"rollout_func": given})
    with caplog.at_level(logging.INFO, "grpo_plus"):
        trainer.train()
    assert seen == [["more"] * 4] * 2
    assert "groups are judged when all are written. A rollout function generates." in caplog.text
    assert "anew" not in caplog.text


def test_messages_are_judged_as_trl_writes_them(tmp_path):
    rows = PROMPTS.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    calls = []

    def judge(completions: list[Any], **_: Any) -> list[float]:
        calls.append(len(completions))
        return vowels([completion[0]["content"] for completion in completions])

    made(tmp_path, judge, train_dataset=rows, generation_chunk_size=4).train()
    assert calls == [4, 4]  # none is made anew


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("grups", "Unknown overlap_rewards 'grups'. Did you mean 'groups'"),
        ({"vowels": "rows"}, "Unknown overlap_rewards 'rows' of 'vowels'"),
        ("{vowels", "is not a JSON object"),
        ('{"vowel": "batch"}', "'vowel', which is no reward function of this run.*Did you mean 'vowels'"),
    ],
)
def test_a_wrong_name_is_refused(tmp_path, way, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, vowels, overlap_rewards=way)
