"""A `generate` of ours on a model, for as long as a rollout takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def installed(model: Any, generate: Callable[..., Any]) -> Iterator[None]:
    """Inside, `model.generate` is `generate`. Afterwards it is what it was, also if the model had one of its own.

    Args:
        model: on which `generate` is called, with wrappers like PEFT's.
    """
    own = vars(model).get("generate")
    model.generate = generate
    try:
        yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own
