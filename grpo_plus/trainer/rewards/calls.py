"""Calls of the reward functions: every error names the function, and `reward_timeout` bounds the time of a call.

TRL calls stand-ins for the functions. A stand-in returns what its function returned, once that is known to be one
number or None per completion. What goes wrong is kept until TRL has gathered the rewards, since the other processes
wait for that, and then ends the training on all processes.
"""

import asyncio
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn

from grpo_plus.trainer.rewards.background import Running, Surroundings, TooLateError, too_late
from grpo_plus.trainer.rewards.logs import with_harmless_logs
from grpo_plus.trainer.rewards.overlap import Overlap
from grpo_plus.trainer.rewards.values import WrongRewardsError, awaited, called, is_async

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam


class RewardFunctionError(RuntimeError):
    """A reward function raised, or did not return in time."""


class RewardCalls:
    """Stands between TRL and the reward functions of one run.

    Args:
        timeout: seconds for one call. None: no bound, and no thread.
        overlap: of the functions that do not wait for TRL's call.
    """

    def __init__(self, trainer: "TRLSeam", timeout: float | None, overlap: Overlap) -> None:
        self._trainer = trainer
        self._timeout = timeout
        self._overlap = overlap
        self._failures: list[Exception] = []

    @contextmanager
    def checked(self, inputs: list[dict[str, Any]], prompts: list, completions: list, ids: list) -> Iterator[None]:
        """Inside, TRL's calls go to stand-ins. Afterwards every process raises what any process has met.

        Args:
            inputs: rows of the dataset.
            ids: token ids of the completions.

        Raises:
            RewardFunctionError: a reward function raised, or took longer than `reward_timeout`.
            ValueError: a reward function returned something else than one number or None per completion.
        """
        trainer = self._trainer
        functions = trainer.reward_funcs
        self._failures = []
        self._overlap.begin(inputs, prompts, completions, ids)
        trainer.reward_funcs = [
            self._stand_in(number, function, name, len(prompts))
            for number, (function, name) in enumerate(zip(functions, trainer.reward_func_names, strict=True))
        ]
        try:
            with self._watching():
                yield
        finally:
            trainer.reward_funcs = functions
        self._raise_together()

    def _stand_in(self, number: int, function: Any, name: str, rows: int) -> Any:
        """A function, a coroutine function or a module, as the original is. A function, where a call has begun."""
        figures = self._trainer._figures
        if isinstance(function, nn.Module):
            return _ModuleStandIn(function, lambda call: self._kept(name, [0.0] * rows, call))
        if self._overlap.has(number):

            def wait(log_metric: Any, log_extra: Any, **_: Any) -> list[Any]:
                logs = (log_metric, log_extra)
                return self._kept(name, [0.0] * rows, lambda: self._overlap.rewards(number, self._timeout, *logs))

            return wait
        if is_async(function):

            async def call_async(**columns: Any) -> list[Any]:
                columns = with_harmless_logs(figures, name, columns)
                try:
                    return await self._bounded_async(name, lambda: awaited(name, function, columns, rows))
                # Whatever the function raises waits until the other processes have gathered. A client of a server
                # may cancel its own call, which is none of Exception's.
                except (Exception, asyncio.CancelledError) as error:
                    return self._keep(name, error, rows)

            return call_async

        def call(**columns: Any) -> list[Any]:
            columns = with_harmless_logs(figures, name, columns)
            compute = functools.partial(called, name, function, columns, rows)
            return self._kept(name, [0.0] * rows, functools.partial(self._bounded, name, compute))

        return call

    def _kept(self, name: str, instead: Any, call: Callable[[], Any]) -> Any:
        """What `call` returns, or `instead` after an error, which is kept."""
        try:
            return call()
        # Whatever the function raises waits until the other processes have gathered.
        except Exception as error:
            self._keep(name, error, 0)
            return instead

    def _keep(self, name: str, error: BaseException, rows: int) -> list[float]:
        ours = isinstance(error, (WrongRewardsError, TooLateError))
        if isinstance(error, WrongRewardsError):
            failure: Exception = ValueError(str(error))
        elif ours:
            failure = RewardFunctionError(str(error))
        else:
            failure = RewardFunctionError(
                f"The reward function {name!r} raised {type(error).__name__}: {_words(error)}"
            )
        failure.__cause__ = None if ours else error
        self._failures.append(failure)
        return [0.0] * rows

    def _raise_together(self) -> None:
        accelerator = self._trainer.accelerator
        mine = self._failures[0] if self._failures else None
        if accelerator.num_processes > 1:
            texts = gather_object([None if mine is None else str(mine)])
            others = [f"Process {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
            if mine is None and others:
                raise RewardFunctionError(others[0])
        if mine is not None:
            raise mine

    def _bounded(self, name: str, compute: Callable[[], list[Any]]) -> list[Any]:
        if self._timeout is None:
            return compute()
        return Running.in_thread(name, compute, Surroundings.here()).result(self._timeout)

    async def _bounded_async(self, name: str, start: Callable[[], Any]) -> list[Any]:
        if self._timeout is None:
            return await start()
        # On TRL's own loop, while this coroutine runs on another: a function that blocks its loop is noticed too.
        future = asyncio.run_coroutine_threadsafe(start(), self._functions_loop)
        done, _ = await asyncio.wait({asyncio.wrap_future(future)}, timeout=self._timeout)
        if not done:
            future.cancel()
            raise TooLateError(too_late(name, self._timeout))
        return future.result()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Let TRL run the coroutines of the stand-ins on a loop that no reward function can block."""
        trainer = self._trainer
        if self._timeout is None or not any(map(is_async, trainer.reward_funcs)):
            yield
            return
        self._functions_loop, watching = trainer.async_loop, asyncio.new_event_loop()
        thread = Thread(target=watching.run_forever, name="reward_timeout", daemon=True)
        thread.start()
        trainer.async_loop = watching
        try:
            yield
        finally:
            trainer.async_loop = self._functions_loop
            watching.call_soon_threadsafe(watching.stop)
            thread.join()
            watching.close()


class _ModuleStandIn(nn.Module):
    """A reward model whose errors go through `keep`."""

    def __init__(self, model: nn.Module, keep: Callable[..., Any]) -> None:
        super().__init__()
        self._model, self._keep = [model], keep  # in a list: no submodule, the model stays as it is

    def forward(self, **inputs: Any) -> Any:
        """The model's output, or zeros after an error."""

        def call() -> Any:
            return SimpleNamespace(logits=self._model[0](**inputs).logits[:, :1])

        output = self._keep(call)
        if isinstance(output, list):
            device = next(iter(inputs.values())).device
            return SimpleNamespace(logits=torch.tensor(output, device=device).unsqueeze(1))
        return output


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error of the user's whose own text fails
        return "(without words)"
