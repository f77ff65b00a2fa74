"""Whether what a checkpoint gives back is the memory of an estimator."""

import math
from typing import Any

# What the estimators of this package remember, by task or by prompt: how many numbers.
# ema_task and popart of version 0.2 had the two means alone.
MOMENTS = {"ema_task": (2, 3), "popart": (2, 3), "spo": (2,)}
MEANING = {
    "ema_task": "the means of the rewards and of their squares, and the largest size",
    "popart": "the means of the rewards and of their squares, and the largest size",
    "spo": "the counts of successes and of failures",
}


def check_saved_state(name: str, state: Any) -> None:
    """Refuse, with a ValueError, a saved state that is none of the estimator `name`.

    An estimator of the user's may remember what it likes, infinities too: of such a state only the kind is checked.
    """
    if not isinstance(state, dict):
        raise ValueError(f"The state of {name!r} is {_shown(state)}, where a dictionary belongs.")
    if name not in MOMENTS:
        return
    for key, numbers in state.items():
        if not _are_moments(numbers, MOMENTS[name]) or (name == "spo" and not sum(numbers) > 0):
            raise ValueError(
                f"The state of {name!r} holds {_shown(numbers)} for {key!r}, where finite numbers belong, from the "
                f"second on not below 0: {MEANING[name]}."
            )


def is_number(value: Any) -> bool:
    """Whether the value is a finite number of JSON's."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_moments(value: Any, lengths: tuple[int, ...]) -> bool:
    if not isinstance(value, list) or len(value) not in lengths:
        return False
    return all(map(is_number, value)) and min(value[1:]) >= 0


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
