"""Fields that hold keyword arguments: a dictionary, or JSON on the command line."""

import json
from typing import Any


def as_dictionary(name: str, given: dict[str, Any] | str | None) -> dict[str, Any]:
    """The dictionary that was given; {} for None.

    Raises:
        ValueError: the text is not a JSON object.
    """
    try:
        keywords = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError:
        keywords = None
    if not isinstance(keywords, dict):
        raise ValueError(f"{name}={given!r} is not a JSON object. Write for example '{{\"ddof\": 0}}'.")
    return keywords


def as_choice(name: str, given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A name with its keywords, {"luffy": {"gamma": 0.1}}, of which the name alone may be given.

    Raises:
        ValueError: the text looks like JSON and is no JSON object.
    """
    if given is None or (isinstance(given, str) and not given.lstrip().startswith("{")):
        return None if given is None else {given: {}}
    return as_dictionary(name, given)
