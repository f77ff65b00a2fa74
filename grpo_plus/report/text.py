"""Small pieces of text: a number with its noun, and what somebody else wrote, made fit to be shown."""

import re


def printable(text: str) -> str:
    """The text without control characters: neither HTML nor SVG may hold them, and a terminal obeys them.

    Signs that turn the direction of writing, such as U+202E, count among them: they let a text read as another one.
    """
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "�", text)


def count(number: int, what: str) -> str:
    """The number with its noun: 1 seed, 2 seeds."""
    return f"{number} {what}{'' if number == 1 else 's'}"
