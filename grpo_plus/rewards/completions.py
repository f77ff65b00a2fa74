"""The text of a completion, and the part of it that answers."""

from collections.abc import Mapping, Sequence
from typing import Any

# What TRL passes as one completion: text, or the messages of a conversation.
Completion = str | Sequence[Mapping[str, Any]] | None


def text_of(completion: Completion) -> str:
    """The text itself, or what the last message says. "" where that says nothing, as a bare call of a tool.

    Examples:
        >>> text_of([{"role": "assistant", "content": "18"}])
        '18'
    """
    if completion is None or isinstance(completion, str):
        return completion or ""
    last = completion[-1] if completion else {}
    if last.get("role", "assistant") != "assistant":  # cut before the model could answer its tool
        return ""
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def answering_part(text: str) -> str:
    """What follows the reasoning. Nothing follows a `<think>` that is still open: numbers in there are no answer.

    Examples:
        >>> answering_part("<think>6 times 3</think>18")
        '18'
    """
    _, closed, answer = text.rpartition("</think>")
    return "" if not closed and "<think>" in text else answer
