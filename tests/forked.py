"""Work in a fork of this process, which has imported everything: importing it again takes ten times as long."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

FORK = multiprocessing.get_context("fork")


def started(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """The process that does the work; it ends with this one."""
    process = FORK.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def exit_code(process: BaseProcess, seconds: float = 120) -> int | None:
    """With what the process has ended: -9 where it was killed; None where it has not ended in that time."""
    process.join(seconds)
    return process.exitcode
