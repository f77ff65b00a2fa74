"""Short texts by which a value is recognized later: of prompts, observations and states."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """16 hexadecimal digits that tell the value from others: of JSON, images and arrays.

    Raises:
        ValueError: the value holds something else.
    """
    return hashlib.sha256(as_text(value).encode()).hexdigest()[:16]


def as_text(value: Any) -> str:
    """The value as JSON, with its images and arrays by their bytes.

    Raises:
        ValueError: the value holds something else.
    """
    return json.dumps(value, sort_keys=True, default=_content)


def _content(part: Any) -> list[Any]:
    """What tells apart a part that is no JSON: an image or an array by its bytes."""
    if not callable(getattr(part, "tobytes", None)):
        raise ValueError(f"holds a {type(part).__name__}")
    shape = [getattr(part, name, None) for name in ("mode", "size", "dtype", "shape")]
    return [str(shape), hashlib.sha256(part.tobytes()).hexdigest()]
