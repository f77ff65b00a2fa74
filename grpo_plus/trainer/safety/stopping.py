"""A run that is asked to stop: the first SIGTERM or Ctrl-C lets the optimizer step finish, a second one does not."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch

# Handlers that nobody has set on purpose. Any other one belongs to the user or to transformers, and stays.
DEFAULTS = {signal.SIGTERM: (signal.SIG_DFL,), signal.SIGINT: (signal.SIG_DFL, signal.default_int_handler)}

# Seconds in which a further signal counts as the first one. A launcher passes on the Ctrl-C that its processes have
# had from the terminal too, and follows with a SIGTERM.
ECHO, ECHO_OF_A_LAUNCHER = 0.5, 5.0

NOTICE = (
    " received: the optimizer step is finished, a checkpoint is written, and the run ends. A second signal ends it at "
    "once.\n"
)


class StopSignals:
    """Remembers the first SIGTERM or SIGINT while it listens.

    Attributes:
        received: the signal's number; None as long as there is none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the place of Python's own handlers, and give it back.

        A handler of the user's stays, and so does that of `enable_jit_checkpoint`. Only the main thread may set
        handlers, so a training in another thread does not listen.
        """
        self.received = None
        self._process = os.getpid()
        self._before = {}
        main = threading.current_thread() is threading.main_thread()
        watch_forks()
        _listening.append(self)
        try:
            for number, defaults in DEFAULTS.items():
                if main and signal.getsignal(number) in defaults:
                    self._before[number] = signal.signal(number, self._receive)
            yield
        finally:
            self.give_back()
            with suppress(ValueError):  # a fork has emptied the list
                _listening.remove(self)

    def give_back(self) -> None:
        """Give the handlers back that were taken."""
        for taken, before in self._before.items():
            if signal.getsignal(taken) == self._receive:
                signal.signal(taken, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A fork that Python does not know of inherits the handler. Process.terminate() would wait for it forever.
            return self._pass_on(number, frame)
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            # print() may not be entered twice, and the signal may have come within one.
            with suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}{NOTICE}".encode())
        elif now - self._since >= (ECHO_OF_A_LAUNCHER if _launched() else ECHO):
            self._pass_on(number, frame)
        return None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Do what the signal does without us."""
        before: Callable[..., Any] | int = self._before[number]
        signal.signal(number, before)
        if callable(before):
            before(number, frame)
        else:
            os.kill(os.getpid(), number)


_listening: list[StopSignals] = []
_forking = threading.local()  # two threads may fork at the same time


@functools.cache
def watch_forks() -> None:
    """Give a forked child its own handlers before a signal can reach it.

    Python forgets the signals that a child receives before it has found itself to be one. Without our handlers such a
    signal ends the child. With them it would be lost, and `multiprocessing.Pool`, which ends its workers by SIGTERM,
    would wait forever. So the signals wait while a fork is made. Hooks cannot be taken back: outside of a training
    they do nothing.
    """
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, DEFAULTS) if _listening else None


def _after_fork() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    while _listening:
        _listening.pop().give_back()
    _after_fork()


def leaving(number: int) -> BaseException:
    """What leaves train() after the checkpoint: exit status 0 for SIGTERM, KeyboardInterrupt for SIGINT."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(0)


def _launched() -> bool:
    return torch.distributed.is_available() and (
        torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized()
    )
