"""Calls that run beside the training, and how long somebody waits for them."""

import contextvars
from asyncio import AbstractEventLoop, run_coroutine_threadsafe
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from dataclasses import dataclass
from threading import Thread
from time import monotonic
from typing import Any

import torch

Start = Callable[[], Coroutine[Any, Any, Any]]


class TooLateError(Exception):
    """A call has not returned in time. Ours, so that a function's own TimeoutError is not taken for it."""


@dataclass(frozen=True)
class Surroundings:
    """What a function sees of the thread that calls it.

    Attributes:
        context: variables of `contextvars`.
        gradients: whether torch records gradients.
        device: CUDA's current one. None before CUDA is used.
    """

    context: contextvars.Context
    gradients: bool
    device: int | None

    @classmethod
    def here(cls) -> "Surroundings":
        """Those of this thread, at this moment."""
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        return cls(contextvars.copy_context(), torch.is_grad_enabled(), device)

    def call(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns when it is called here."""
        if self.device is not None:
            torch.cuda.set_device(self.device)
        with torch.set_grad_enabled(self.gradients):
            return self.context.copy().run(compute)


@dataclass(frozen=True)
class Running:
    """A call that has begun.

    Attributes:
        name: of the reward function.
        began: a time of `monotonic()`.
    """

    name: str
    future: "Future[Any]"
    began: float

    @classmethod
    def in_thread(cls, name: str, compute: Callable[[], Any], around: Surroundings) -> "Running":
        """Call `compute` in a thread of its own.

        A thread cannot be stopped: whoever waits no longer leaves it behind. It does not keep the process alive.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                result = around.call(compute)
            # Raised again in the thread that waits.
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        began = monotonic()
        Thread(target=work, name=f"reward function {name}", daemon=True).start()
        return cls(name, future, began)

    @classmethod
    def on_loop(cls, name: str, start: Start, loop: AbstractEventLoop, around: Surroundings) -> "Running":
        """Run a coroutine on a loop that runs in another thread."""
        began = monotonic()
        return cls(name, around.context.copy().run(lambda: run_coroutine_threadsafe(start(), loop)), began)

    def result(self, timeout: float | None) -> Any:
        """What the call returns, or raises.

        Args:
            timeout: seconds that the call may have taken by the time that somebody waits for it. None: no bound.

        Raises:
            TooLateError: the call has not returned in time.
        """
        left = None if timeout is None else max(0.0, self.began + timeout - monotonic())
        if not wait([self.future], left).done:
            self.future.cancel()  # a coroutine ends, a thread does not
            raise TooLateError(too_late(self.name, timeout or 0.0))
        return self.future.result()


def too_late(name: str, seconds: float) -> str:
    """The message of a call that took too long."""
    return (
        f"The reward function {name!r} has not returned after reward_timeout={seconds:g} seconds. If it may take "
        "longer, raise reward_timeout; a judge over the network needs a timeout of its own that returns None."
    )
