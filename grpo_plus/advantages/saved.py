"""Whether what a checkpoint gives back is the memory of an estimator."""

import math
from typing import Any

# What the estimators of this package remember, by task or by prompt: two numbers each.
PAIRS = {
    "ema_task": "the means of the rewards and of their squares",
    "popart": "the means of the rewards and of their squares",
    "spo": "the counts of successes and of failures",
}


def check_saved_state(name: str, state: Any) -> None:
    """Refuse, with a ValueError, a saved state that is none of the estimator `name`.

    An estimator of the user's may remember what it likes, infinities too: of such a state only the kind is checked.
    """
    if not isinstance(state, dict):
        raise ValueError(f"The state of {name!r} is {_shown(state)}, where a dictionary belongs.")
    if name not in PAIRS:
        return
    for key, pair in state.items():
        if not _is_pair(pair) or (name == "spo" and not sum(pair) > 0):
            raise ValueError(
                f"The state of {name!r} holds {_shown(pair)} for {key!r}, where two finite numbers belong, the second "
                f"not below 0: {PAIRS[name]}."
            )


def is_number(value: Any) -> bool:
    """Whether the value is a finite number of JSON's."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[1] >= 0


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
