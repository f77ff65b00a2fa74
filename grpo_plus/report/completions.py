"""Tables of completions: the columns that are no rewards, and what a message says.

Each column of numbers that is not listed here is a reward function's.
"""

from typing import Any

LENGTH = "completion_length"  # in tokens, where a reward function logs it
# What a reward function may fill through `log_extra`, with lists, one per completion.
STEP_COLUMNS = ("step_rewards", "step_ends")
STATES = "step_states"  # texts, of the states that steps start from
NOT_REWARDS = {"step", "prompt", "completion", "advantage", "group", "task", LENGTH, *STEP_COLUMNS, STATES}


def said(content: Any) -> str:
    """The text of a message's content. Of a picture and the like, its kind in brackets."""
    if isinstance(content, list):
        # Where one part has a text, a table gives every part the entry, None for pictures.
        return " ".join(part.get("text") or f"[{part.get('type')}]" for part in content)
    return "" if content is None else str(content)
