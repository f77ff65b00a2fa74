"""Dropout of a model: whether there is any, and a forward without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def dropout_of(model: nn.Module) -> str | None:
    """Describe the first dropout above 0 in the model. None without dropout."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"dropout {module.p} in {name}"
    config: Any = getattr(model, "config", None)
    rate = getattr(config, "attention_dropout", 0.0) or 0.0
    return f"attention_dropout {rate}" if rate > 0 else None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Put a model with dropout into eval mode, inside. Afterwards each module goes back to its own mode."""
    if dropout_of(model) is None or not model.training:
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
