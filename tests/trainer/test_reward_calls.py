"""What a reward function can do wrong names the function; what takes too long is bounded by `reward_timeout`."""

import asyncio
import contextvars
import threading
import time
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.rewards.calls import RewardFunctionError
from tests.training import logs_of, make_trainer, vowels

OURS: dict[str, Any] = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig, "max_steps": 1}
NUMBERS = [0.5, 1, True, None, np.float32(0.25), torch.tensor(0.125), Fraction(1, 2), Decimal("0.75")]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("run"), reward_funcs=[vowels, vowels_too], **OURS)


def vowels_too(completions: list[str], **_: Any) -> list[float]:
    return vowels(completions)


def scored(trainer: Any, *functions: Any, timeout: float | None = None) -> torch.Tensor:
    """The reward table (8, K) of TRL's own call, with these functions in the place of the trainer's."""
    names = [getattr(function, "__name__", "judge") for function in functions]
    trainer.reward_funcs, trainer.reward_func_names = list(functions), names
    trainer.reward_processing_classes = [None] * len(functions)
    trainer.reward_weights = torch.ones(len(functions))
    trainer._reward_calls._timeout = timeout
    if not hasattr(trainer, "async_loop"):
        trainer.async_loop = asyncio.new_event_loop()
        threading.Thread(target=trainer.async_loop.run_forever, daemon=True).start()
    rows = [{"prompt": "1+1=", "answer": "2"}] * 8
    return trainer._calculate_rewards(rows, ["1+1="] * 8, ["2"] * 8, [[1]] * 8)


def returning(value: Any, name: str = "judge") -> Any:
    def function(**_: Any) -> Any:
        return value

    async def function_async(**_: Any) -> Any:
        return value

    for each in (function, function_async):
        each.__name__ = name
    return function, function_async


@pytest.mark.parametrize("kind", [0, 1], ids=["function", "coroutine"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dict.fromkeys(range(8), 0.5), r"returned \{0: 0.5.*\(dict\). Return a list of one number per completion, 8"),
        ("12345678", r"returned '12345678' \(str\)"),
        (set(range(8)), r"returned .*\(set\)"),
        (None, r"returned None \(NoneType\)"),
        (1.0, r"returned 1.0 \(float\)"),
        (torch.tensor(1.0), r"returned tensor\(1.\) \(Tensor\)"),
        ([0.0] * 7, "returned 7 rewards for 8 completions"),
        ([0.0] * 7 + ["1"], r"returned '1' \(str\) for completion 7, which is text"),
        ([[0.0]] * 8, r"returned \[0.0\] \(list\) for completion 0, which is a list of its own"),
        (torch.zeros(8, 1), r"returned tensor\(\[0.\]\) \(Tensor\) for completion 0, which is a list of its own"),
        (
            [0.0, {"score": 1}, *[0.0] * 6],
            r"returned \{'score': 1\} \(dict\) for completion 1, which is a dict and no number",
        ),
        ([0.0, 1j, *[0.0] * 6], "returned 1j .* for completion 1, which is a complex and no number"),
        ([10**400, *[0.0] * 7], "returned 10000.* for completion 0, which is too large for a float"),
    ],
)
def test_what_is_no_list_of_rewards_names_the_function_and_the_completion(trainer, kind, value, message):
    with pytest.raises(ValueError, match=f"The reward function 'judge' {message}"):
        scored(trainer, vowels, returning(value)[kind])


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("kind", [0, 1], ids=["function", "coroutine"])
@pytest.mark.parametrize("container", [list, tuple, iter, lambda values: (value for value in values)])
def test_every_kind_of_number_in_every_sequence_is_taken(trainer, kind, container, timeout):
    table = scored(
        trainer,
        partial(lambda kind, **k: container(NUMBERS), kind) if kind == 0 else aiter_of(container),
        timeout=timeout,
    )
    expected = torch.tensor([0.5, 1.0, 1.0, torch.nan, 0.25, 0.125, 0.5, 0.75])
    torch.testing.assert_close(table[:, 0], expected, equal_nan=True)


def aiter_of(container: Any) -> Any:
    async def judge(**_: Any) -> Any:
        return container(NUMBERS)

    return judge


@pytest.mark.parametrize("rewards", [torch.arange(8.0), np.arange(8)])
def test_a_vector_is_taken(trainer, rewards):
    assert scored(trainer, returning(rewards)[0])[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("kind", ["function", "coroutine", "partial", "module"])
def test_what_a_reward_function_raises_is_named_and_keeps_its_cause(trainer, kind, timeout):
    def broken(**_: Any) -> Any:
        return {}["b"]

    async def broken_async(**_: Any) -> Any:
        return {}["b"]

    class Model(torch.nn.Module):
        def forward(self, **_: Any) -> Any:
            return {}["b"]

    function = {
        "function": broken,
        "coroutine": broken_async,
        "partial": partial(broken_async, extra=1),
        "module": Model(),
    }[kind]
    score = partial(scored_module, trainer) if kind == "module" else partial(scored, trainer, timeout=timeout)
    with pytest.raises(RewardFunctionError, match="The reward function .* raised KeyError: 'b'") as raised:
        score(function)
    assert isinstance(raised.value.__cause__, KeyError)
    assert trainer.reward_funcs == [function]


def test_a_call_that_cancels_itself_is_named(trainer):
    async def judge(**_: Any) -> Any:
        raise asyncio.CancelledError

    with pytest.raises(RewardFunctionError, match="'judge' raised CancelledError"):
        scored(trainer, judge)


def test_an_error_without_words_is_named(trainer):
    class MuteError(Exception):
        def __str__(self):
            raise KeyError("detail")

    def judge(**_: Any) -> Any:
        raise MuteError

    with pytest.raises(RewardFunctionError, match="'judge' raised MuteError"):
        scored(trainer, judge)


def tokens(**_: Any) -> Any:
    return {"input_ids": torch.zeros(8, 1, dtype=torch.long)}


def scored_module(trainer: Any, module: torch.nn.Module) -> torch.Tensor:
    trainer.reward_funcs, trainer.reward_func_names = [module], ["model"]
    trainer.reward_processing_classes, trainer.reward_weights = [tokens], torch.ones(1)
    return trainer._calculate_rewards([{"prompt": "1"}] * 8, ["1"] * 8, ["2"] * 8, [[1]] * 8)


def test_a_reward_model_scores_as_without_the_stand_in(trainer):
    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return SimpleNamespace(logits=torch.arange(16.0).view(8, 2))

    assert scored_module(trainer, Model())[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def sleeping(**_: Any) -> list[float]:
    time.sleep(2)
    return [0.0] * 8


async def sleeping_async(**_: Any) -> list[float]:
    await asyncio.sleep(2)
    return [0.0] * 8


async def blocking_async(**_: Any) -> list[float]:
    time.sleep(1)  # blocks the loop itself
    return [0.0] * 8


@pytest.mark.parametrize("function", [sleeping, sleeping_async, blocking_async, partial(sleeping_async, more=1)])
def test_a_function_that_does_not_return_in_time_is_named(trainer, function):
    began = time.monotonic()
    with pytest.raises(RewardFunctionError, match="has not returned after reward_timeout=0.2 seconds"):
        scored(trainer, vowels, function, timeout=0.2)
    assert time.monotonic() - began < 0.9


def test_a_timeout_error_of_the_functions_own_is_not_taken_for_ours(trainer):
    async def impatient(**_: Any) -> list[float]:
        return await asyncio.wait_for(asyncio.sleep(9), 0.01)

    def slow_server(**_: Any) -> list[float]:
        raise TimeoutError("the server")

    for function in (impatient, slow_server):
        with pytest.raises(RewardFunctionError, match=f"'{function.__name__}' raised TimeoutError"):
            scored(trainer, function, timeout=30.0)


def test_a_timed_function_sees_the_callers_context_and_gradient_mode(trainer):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="lost")
    seen = []

    def judge(**_: Any) -> list[float]:
        seen.append((variable.get(), torch.is_grad_enabled()))
        return [0.0] * 8

    async def judge_async(**_: Any) -> list[float]:
        seen.append((variable.get(), False))
        return [0.0] * 8

    variable.set("kept")
    with torch.no_grad():
        scored(trainer, judge, judge_async, timeout=30.0)
    assert seen == [("kept", False)] * 2


def test_two_coroutines_still_run_at_the_same_time_and_on_trls_loop(trainer):
    loops, meeting = [], []

    def waiting(name: str) -> Any:
        async def judge(**_: Any) -> list[float]:
            loops.append(asyncio.get_running_loop())
            meeting.append(name)
            while len(meeting) < 2:
                await asyncio.sleep(0.01)
            return [1.0] * 8

        return judge

    table = scored(trainer, waiting("a"), waiting("b"), timeout=30.0)
    assert table.tolist() == [[1.0, 1.0]] * 8
    assert set(loops) == {trainer.async_loop}


def odd_logs(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    log_metric("mine/number", torch.tensor(2.0))
    log_metric("mine/text", "high")
    log_metric("mine/none", None)
    log_metric(None, 1.0)  # TRL sorts the names: None among text ended the training
    log_extra(5, completions)
    log_extra("short", ["only one"])
    log_extra("scalar", 5)
    log_extra("whole", [len(text) for text in completions])
    return vowels(completions)


def test_figures_of_a_reward_function_that_cannot_be_logged_end_nothing(tmp_path, capsys):
    trainer = make_trainer(tmp_path, reward_funcs=[odd_logs], log_completions=True, **OURS)
    with pytest.warns(UserWarning, match="log_") as caught:
        trainer.train()
    log = logs_of(trainer)[0]
    assert {name: value for name, value in log.items() if name.startswith("mine/")} == {"mine/number": 2.0}
    said = [str(warning.message) for warning in caught if "log_" in str(warning.message)]
    known = ("mine/text", "mine/none", "(None", "(5", "scalar", "short")
    assert [next(word for word in known if word in line) for line in said] == [
        "mine/text",
        "mine/none",
        "(None",
        "(5",
        "scalar",
        "short",
    ]
    capsys.readouterr()


def test_a_timeout_changes_nothing_else(tmp_path):
    logs = []
    for seconds in (None, 60.0):
        trainer = make_trainer(tmp_path, reward_timeout=seconds, **OURS)
        trainer.train()
        logs.append(logs_of(trainer))
    assert logs[0] == logs[1]
