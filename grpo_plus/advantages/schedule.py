"""Reward weights that change over a run: form first, for example, and correctness later."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_plus.advantages.checks import check_weights

Schedule = Mapping[str, Sequence[float]]
"""Reward -> its weights, spread evenly over the run from the first to the last: `{"format": [1.0, 0.1]}`."""


def weight_at(points: Sequence[float], progress: float) -> float:
    """The weight at a share of the run, linear between two neighboring points.

    Args:
        points: at least two weights, at equal distances from the start of the run to its end.
        progress: 0 at the start, 1 at the end.
    """
    place = min(max(progress, 0.0), 1.0) * (len(points) - 1)
    before = min(int(place), len(points) - 2)
    return points[before] + (place - before) * (points[before + 1] - points[before])


def check_schedule(schedule: Mapping[str, Any]) -> dict[str, list[float]]:
    """The schedule with numbers in the place of text.

    Raises:
        ValueError: an entry is no list of two or more finite numbers.
    """
    checked = {}
    for name, points in schedule.items():
        if not isinstance(points, list | tuple) or len(points) < 2:
            raise ValueError(
                f"reward_weight_schedule[{name!r}]={points!r} is no list of two or more weights. Write those from the "
                "start of the run to its end, such as [1.0, 0.1]. A weight that stays as it is belongs in "
                "reward_weights."
            )
        checked[name] = check_weights(points, f"reward_weight_schedule[{name!r}]")
    return checked
