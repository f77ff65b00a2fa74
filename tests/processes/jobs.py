"""What the tests of this folder want trained, under two processes: they enter it as they are imported."""

from typing import Any

JOBS: dict[str, dict[str, Any]] = {}


def job(name: str, **config: Any) -> str:
    """Enters a training; `resume_from` names the job and the checkpoint to go on from."""
    JOBS[name] = config
    return name
