"""Values of a user's code as the plain types that a checkpoint can give back."""

from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """The value in types that `torch.load(weights_only=True)` accepts.

    numpy's numbers and strings, and an IntEnum, are subclasses of float, str and int. They would be saved as themselves
    and refused later. What has no plain form, such as an image, becomes its text.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str) or kind is Tensor:
        return value
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    # Not int(value), which a subclass may answer as it likes.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)
