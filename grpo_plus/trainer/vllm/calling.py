"""Let a function of TRL call something of ours, for as long as it lasts."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def calling(function: Callable[..., Any], **names: Any) -> Iterator[None]:
    """Let a function of TRL find something else under these names of its module, and give the names back.

    Raises:
        RuntimeError: the function looks none of this up, so that TRL's own way would be taken without a word.
    """
    function = inspect.unwrap(function)
    if unknown := sorted(set(names) - set(function.__code__.co_names)):
        raise RuntimeError(
            f"vllm_lora_sync=True replaces {unknown[0]} in {function.__qualname__}, which this TRL does not call "
            "there. `grpo-plus doctor` says which versions of TRL were tested."
        )
    found = function.__globals__
    before = {name: found[name] for name in names if name in found}  # TRL imports LLM only beside vLLM
    found.update(names)
    try:
        yield
    finally:
        for name in names:
            del found[name]
        found.update(before)
