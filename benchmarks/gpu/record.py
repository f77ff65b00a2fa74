"""What a run has found: rows by stage, written again after every item, and deadlines."""

import contextlib
import json
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN = ("label", "trace", "kernels", "places", "raw", "log", "profile")  # what a line of the summary leaves out


class OutOfTimeError(BaseException):
    """A stage's time is up. No Exception, so that nothing takes it for a failure of its own."""


@dataclass(frozen=True)
class Setting:
    """How the stages run.

    device: "cuda", or "cpu" for a rehearsal at tiny sizes.
    repeats: timed calls of an update.
    """

    device: str
    repeats: int

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device == "cpu"


class Record:
    """Rows of all stages and the lines of the summary, in `results.json` and `summary.txt` of a folder."""

    def __init__(self, out: Path, command: str) -> None:
        self.out, self.began = out, time.perf_counter()
        self.results: dict[str, Any] = {"command": command, "stages": {}}
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Print a line and keep it for the summary."""
        self.lines.append(text)
        print(f"[{time.perf_counter() - self.began:6.1f}] {text}", flush=True)

    def save(self) -> None:
        """Write both files."""
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1, default=str) + "\n")
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")


class Stage:
    """A part of the run."""

    def __init__(self, name: str, record: Record) -> None:
        self.record, self.rows = record, list[dict[str, Any]]()
        record.results["stages"][name] = {"rows": self.rows}

    def item(self, label: str, call: Callable[..., Any], *arguments: Any, quiet: bool = False) -> dict[str, Any]:
        """Keep what a call returns as a row under a label. A failure is a row too."""
        started = time.perf_counter()
        row: dict[str, Any] = {"label": label}
        self.rows.append(row)
        try:
            value = call(*arguments)
            row |= value if isinstance(value, dict) else {"value": value}
        except OutOfTimeError:
            row["failure"] = "out of time"
            raise
        except (Exception, SystemExit) as failure:  # whatever a new card or version brings: the other items are wanted
            row |= described(failure)
            self.record.say(f"  FAILED {label}: {row['failure'][:300]}")
        finally:
            row["took_s"] = round(time.perf_counter() - started, 2)
            self.record.save()
        if not quiet and "failure" not in row:
            shown = {key: value for key, value in row.items() if key not in HIDDEN}
            self.record.say(f"  {label}: {json.dumps(shown, default=str)[:600]}")
        return row


def described(failure: BaseException) -> dict[str, Any]:
    """A failure and where it came from, without the folders of this machine."""
    frames = traceback.extract_tb(failure.__traceback__)[-8:]
    return {
        "failure": without_folders(f"{type(failure).__name__}: {str(failure)[:600]}"),
        "trace": [f"{without_folders(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames],
    }


def without_folders(text: str) -> str:
    """Cut absolute paths down to their last two parts."""
    return re.sub(r"(?<![\w.])(?:/[\w.@+-]+){2,}", lambda path: "/".join(path[0].split("/")[-2:]), text)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside, once the time is up."""

    def alarm(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, max(0.5, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
