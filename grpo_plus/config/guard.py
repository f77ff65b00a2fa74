"""The settings of the guard of a run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig


def check_guard(config: "GRPOPlusConfig") -> None:
    """Refuse a number that counts no steps."""
    steps = config.max_nonfinite_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(
            f"max_nonfinite_steps={steps!r} is not a number of optimizer steps. Use 1 to end the run at the first step "
            "that is not finite, or a few such as 5."
        )
