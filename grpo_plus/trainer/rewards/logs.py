"""What reward functions log: checked before it reaches TRL, and kept where a call runs before its turn."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpo_plus.report.completions import STATES, STEP_COLUMNS
from grpo_plus.trainer.figures import Figures

Log = Callable[[str, Any], None]


def with_harmless_logs(figures: Figures, name: str, columns: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a reward function. Its `log_metric` and `log_extra` warn where TRL's would end the training."""
    log_metric, log_extra = columns["log_metric"], columns["log_extra"]

    def metric(figure: str, value: Any) -> None:
        with figures.guarded(f"log_metric({figure!r}, ...) of the reward function {name!r}"):
            log_metric(_text(figure), float(value))

    def extra(column: str, values: Any) -> None:
        if column in (*STEP_COLUMNS, STATES):  # the estimator reads these: a wrong one is an error
            log_extra(column, values)
            return
        with figures.guarded(f"log_extra({column!r}, ...) of the reward function {name!r}"):
            log_extra(_text(column), list(values))

    return columns | {"log_metric": metric, "log_extra": extra}


@dataclass(frozen=True)
class KeptLogs:
    """What one call logs, in order, until the time comes at which TRL would have called the function."""

    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: list[tuple[str, list]] = field(default_factory=list)

    def metric(self, name: str, value: float) -> None:
        """Take the place of TRL's `log_metric`."""
        self.metrics.append((name, value))

    def extra(self, column: str, values: Any) -> None:
        """Take the place of TRL's `log_extra`."""
        self.extras.append((column, list(values)))

    def hand_over(self, log_metric: Log, log_extra: Log) -> None:
        """Log with TRL's functions."""
        for name, value in self.metrics:
            log_metric(name, value)
        for column, values in self.extras:
            log_extra(column, values)


def _text(name: Any) -> str:
    if not isinstance(name, str):  # TRL sorts the names, which ends the training where some are no text
        raise TypeError(f"the name must be text, not {type(name).__name__}")
    return name
