"""Calls of the reward functions: every error names the function, and `reward_timeout` bounds the time of a call.

TRL calls stand-ins for the functions. A stand-in returns what its function returned, once that is known to be one
number or None per completion. What goes wrong is kept until TRL has gathered the rewards, since the other processes
wait for that, and then ends the training on all processes.
"""

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn

from grpo_plus.report.completions import STATES, STEP_COLUMNS

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam


class RewardFunctionError(RuntimeError):
    """A reward function raised, or did not return in time."""


class RewardCalls:
    """Stands between TRL and the reward functions of one run.

    Args:
        timeout: seconds for one call. None: no bound, and no thread.
    """

    def __init__(self, trainer: "TRLSeam", timeout: float | None) -> None:
        self._trainer = trainer
        self._timeout = timeout
        self._failures: list[Exception] = []

    @contextmanager
    def checked(self, rows: int) -> Iterator[None]:
        """Inside, TRL's calls go to stand-ins. Afterwards every process raises what any process has met.

        Raises:
            RewardFunctionError: a reward function raised, or took longer than `reward_timeout`.
            ValueError: a reward function returned something else than one number or None per completion.
        """
        trainer = self._trainer
        functions = trainer.reward_funcs
        self._failures = []
        trainer.reward_funcs = [
            self._stand_in(function, name, rows)
            for function, name in zip(functions, trainer.reward_func_names, strict=True)
        ]
        try:
            with self._watching():
                yield
        finally:
            trainer.reward_funcs = functions
        self._raise_together()

    def _stand_in(self, function: Any, name: str, rows: int) -> Any:
        """A function, a coroutine function or a module, as the original is."""
        if isinstance(function, nn.Module):
            return _ModuleStandIn(function, lambda call: self._kept(name, [0.0] * rows, call))
        if is_async(function):

            async def call_async(**columns: Any) -> list[Any]:
                columns = self._with_harmless_logs(name, columns)
                try:
                    return await self._bounded_async(name, lambda: function(**columns), rows)
                # Whatever the function raises waits until the other processes have gathered. A client of a server
                # may cancel its own call, which is none of Exception's.
                except (Exception, asyncio.CancelledError) as error:
                    return self._keep(name, error, rows)

            return call_async

        def call(**columns: Any) -> list[Any]:
            columns = self._with_harmless_logs(name, columns)
            compute = functools.partial(_called, name, function, columns, rows)
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
        ours = isinstance(error, (_WrongRewardsError, _TooLateError))
        if isinstance(error, _WrongRewardsError):
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
        return compute() if self._timeout is None else within(self._timeout, name, compute)

    async def _bounded_async(self, name: str, start: Callable[[], Any], rows: int) -> list[Any]:
        async def compute() -> list[Any]:
            return as_rewards(name, await start(), rows)

        if self._timeout is None:
            return await compute()
        # On TRL's own loop, while this coroutine runs on another: a function that blocks its loop is noticed too.
        future = asyncio.run_coroutine_threadsafe(compute(), self._functions_loop)
        done, _ = await asyncio.wait({asyncio.wrap_future(future)}, timeout=self._timeout)
        if not done:
            future.cancel()
            raise _TooLateError(_too_late(name, self._timeout))
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

    def _with_harmless_logs(self, name: str, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns with a `log_metric` and a `log_extra` that warn where TRL's would end the training."""
        figures, log_metric, log_extra = self._trainer._figures, columns["log_metric"], columns["log_extra"]

        def metric(figure: str, value: Any) -> None:
            with figures.guarded(f"log_metric({figure!r}, ...) of the reward function {name!r}"):
                log_metric(_text(figure), float(value))

        def extra(column: str, values: Any) -> None:
            if column in (*STEP_COLUMNS, STATES):  # the estimator reads these: a wrong one is an error
                log_extra(column, values)
                return
            with figures.guarded(f"log_extra({column!r}, ...) of the reward function {name!r}"):
                log_extra(_text(column), list(values))

        return columns | {"log_metric": metric, "log_extra": extra}


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


class _WrongRewardsError(Exception):
    """What a reward function returned is no list of rewards."""


class _TooLateError(Exception):
    """Ours, so that a function's own TimeoutError is not taken for it."""


def is_async(function: Any) -> bool:
    """Whether TRL awaits what the function returns."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def within(seconds: float, name: str, compute: Callable[[], Any]) -> Any:
    """Run `compute` in a thread with this thread's context variables, CUDA device and gradient mode.

    A thread cannot be stopped: after the timeout it is left behind, and does not keep the process alive.
    """
    context, gradients = contextvars.copy_context(), torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.set_grad_enabled(gradients):
                outcome.append((context.run(compute), None))
        # Raised again in the thread that waits.
        except BaseException as error:
            outcome.append((None, error))

    thread = Thread(target=work, name=f"reward function {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _TooLateError(_too_late(name, seconds))
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def as_rewards(name: str, returned: Any, rows: int) -> list[Any]:
    """The rewards as a list of numbers and None.

    Raises:
        _WrongRewardsError: it is anything else.
    """
    source = f"The reward function {name!r} returned"
    wanted = f"Return a list of one number per completion, {rows} here, with None where it cannot judge."
    if isinstance(returned, (str, bytes, Mapping, set, frozenset)) or not _iterable(returned):
        raise _WrongRewardsError(f"{source} {_short(returned)}. {wanted}")
    rewards = list(returned)
    if len(rewards) != rows:
        raise _WrongRewardsError(f"{source} {len(rewards)} rewards for {rows} completions. {wanted}")
    for completion, reward in enumerate(rewards):
        if reward is not None and (reason := _why_no_number(reward)):
            raise _WrongRewardsError(f"{source} {_short(reward)} for completion {completion}, {reason}. {wanted}")
    return [reward if isinstance(reward, _TAKEN) else float(reward) for reward in rewards]


# What TRL turns into float32 by itself. Others, such as a Fraction, become a float first.
_TAKEN = (type(None), bool, int, float, torch.Tensor)


def _called(name: str, function: Any, columns: dict[str, Any], rows: int) -> list[Any]:
    return as_rewards(name, function(**columns), rows)


def _why_no_number(reward: Any) -> str | None:
    if isinstance(reward, (str, bytes)):
        return "which is text"
    if getattr(reward, "ndim", 0) or isinstance(reward, (list, tuple)):
        return "which is a list of its own"
    try:
        float(reward)
    except OverflowError:
        return "which is too large for a float"
    except (TypeError, ValueError, RuntimeError):
        return f"which is a {type(reward).__name__} and no number"
    return None


def _iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # a tensor without dimensions has __iter__ and raises too
        return False
    return True


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error of the user's whose own text fails
        return "(without words)"


def _text(name: Any) -> str:
    if not isinstance(name, str):  # TRL sorts the names, which ends the training where some are no text
        raise TypeError(f"the name must be text, not {type(name).__name__}")
    return name


def _too_late(name: str, seconds: float) -> str:
    return (
        f"The reward function {name!r} has not returned after reward_timeout={seconds:g} seconds. If it may take "
        "longer, raise reward_timeout; a judge over the network needs a timeout of its own that returns None."
    )
