"""Tables of completions: the columns that are no rewards, and what a message says.

Each column of numbers that is not listed here is a reward function's.
"""

from collections.abc import Mapping
from typing import Any

LENGTH = "completion_length"  # in tokens, where a reward function logs it
# What a reward function may fill through `log_extra`, with lists, one per completion.
STEP_COLUMNS = ("step_rewards", "step_ends")
STATES = "step_states"  # texts, of the states that steps start from
NOT_REWARDS = {"step", "prompt", "completion", "advantage", "group", "task", LENGTH, *STEP_COLUMNS, STATES}


def as_text(written: Any) -> str:
    """A prompt or a completion as text: messages one after the other, each after its role, calls of tools included."""
    if isinstance(written, list) and all(isinstance(message, Mapping) for message in written):
        return "\n".join(f"{message.get('role', '')}: {_message(message)}" for message in written)
    return "" if written is None else str(written)


def _message(message: Mapping[str, Any]) -> str:
    calls = [_call(call.get("function") or call) for call in message.get("tool_calls") or []]
    return " ".join(filter(None, [said(message.get("content")), *calls]))


def _call(function: Mapping[str, Any]) -> str:
    given = function.get("arguments") or ""
    if isinstance(given, Mapping):
        # A table gives each call the arguments of every tool, None for those that it lacks.
        given = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    return f"{function.get('name')}({given})"


def said(content: Any) -> str:
    """The text of a message's content. Of a picture and the like, its kind in brackets."""
    if isinstance(content, list):
        # Where one part has a text, a table gives every part the entry, None for pictures.
        return " ".join(
            part if isinstance(part, str) else part.get("text") or f"[{part.get('type')}]" for part in content
        )
    return "" if content is None else str(content)
