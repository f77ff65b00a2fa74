"""Which reward functions judge beside the rest of a step, and in which calls."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_plus.config.keywords import as_dictionary
from grpo_plus.registry import suggestion

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig

BATCH, GROUPS = OVERLAPS = ("batch", "groups")


def check_overlap(config: "GRPOPlusConfig") -> None:
    """Refuse an unknown way to call reward functions. JSON from the command line becomes a dictionary."""
    given = config.overlap_rewards
    if given is None or given in OVERLAPS:
        return
    if not isinstance(given, dict) and not str(given).lstrip().startswith("{"):
        raise ValueError(
            f"Unknown overlap_rewards {given!r}.{suggestion(str(given), OVERLAPS)} Or name functions: "
            "{'judge': 'groups'}."
        )
    named = as_dictionary("overlap_rewards", given)
    for name, way in named.items():
        if way not in OVERLAPS:
            raise ValueError(f"Unknown overlap_rewards {way!r} of {name!r}.{suggestion(str(way), OVERLAPS)}")
    config.overlap_rewards = named


def check_overlapping(config: "GRPOPlusConfig", names: Sequence[str]) -> None:
    """Refuse the name of a function that does not judge in this run.

    Args:
        names: of the reward functions, without reward models.
    """
    names = list(dict.fromkeys(names))
    for name in config.overlap_rewards if isinstance(config.overlap_rewards, dict) else ():
        if name not in names:
            raise ValueError(
                f"overlap_rewards names {name!r}, which is no reward function of this run. A reward model keeps its "
                f"place.{suggestion(name, names)}"
            )
