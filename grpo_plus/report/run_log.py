"""grpo_plus_log.jsonl: what a run logs, line by line while it goes on.

A callback writes the file, and `grpo-plus watch` reads it. A run of TRL's without the callback has its log in the
trainer_state.json of its newest checkpoint.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_plus.report.files import read_json
from grpo_plus.report.run_file import numbered

LOG_FILE = "grpo_plus_log.jsonl"
BEGIN, LOG, END = "begin", "log", "end"
RECENT = 20  # logs that the speed is taken over


@dataclass(frozen=True)
class Entry:
    """One log of a run.

    Attributes:
        step: optimizer steps that were finished.
        time: seconds since 1970. None where the file does not say.
        figures: what was logged, by name.
    """

    step: int
    time: float | None
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class RunLog:
    """The log of a run as far as it has come.

    Attributes:
        entries: in the order of their steps. What a resumed run has done again stands there once.
        max_steps: optimizer steps of the whole run; 0 where nobody says.
        ended: whether the training is over.
        since: the step from which the run goes on without a break.
    """

    entries: tuple[Entry, ...] = ()
    max_steps: int = 0
    ended: bool = False
    since: int = 0

    @property
    def step(self) -> int:
        """Steps that were finished at the last log."""
        return self.entries[-1].step if self.entries else self.since

    @property
    def seconds_per_step(self) -> float | None:
        """Over the newest logs since the run began or was resumed. None where too few logs say when they were made."""
        timed = [entry for entry in self.entries if entry.time is not None and entry.step >= self.since][-RECENT:]
        if not timed or timed[-1].step == timed[0].step:
            return None
        first, last = timed[0], timed[-1]
        return (float(last.time or 0) - float(first.time or 0)) / (last.step - first.step)

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the present speed. None where the speed or the end is not known."""
        if self.seconds_per_step is None or not self.max_steps:
            return None
        return max(self.max_steps - self.step, 0) * self.seconds_per_step

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a figure, where it is a number."""
        values = [(entry.step, entry.figures.get(name)) for entry in self.entries]
        return [
            (step, float(value))
            for step, value in values
            if isinstance(value, int | float) and not isinstance(value, bool) and value == value
        ]


def append_line(folder: str | Path, line: Mapping[str, Any], *, anew: bool = False) -> None:
    """Add a line to the log in `folder`, or begin the file anew."""
    path = Path(folder, LOG_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb+" if anew else "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a killed process has left half a line, which must not swallow this one
                file.write(b"\n")
        file.write(json.dumps(line, default=str).encode() + b"\n")


def read_log(folder: str | Path) -> RunLog | None:
    """The log of the run that writes into `folder`; None where there is none yet."""
    path = Path(folder, LOG_FILE)
    if path.is_file():
        return _joined(_lines(path.read_text(encoding="utf-8", errors="replace")))
    return _of_checkpoint(Path(folder))


def _lines(text: str) -> Iterator[dict[str, Any]]:
    """The lines that are whole: the last one may be half written."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            yield found


def _joined(lines: Iterator[dict[str, Any]]) -> RunLog:
    entries: list[Entry] = []
    max_steps, since, ended = 0, 0, False
    for line in lines:
        max_steps = line["max_steps"] if isinstance(line.get("max_steps"), int) else max_steps
        ended = line.get("event") == END
        if line.get("event") == BEGIN:
            since = line["step"]
            entries = [entry for entry in entries if entry.step <= since]
        elif line.get("event") == LOG and isinstance(line.get("figures"), dict):
            when = line.get("time")
            entries.append(Entry(line["step"], when if isinstance(when, int | float) else None, line["figures"]))
    return RunLog(tuple(entries), max_steps, ended, since)


def _of_checkpoint(folder: Path) -> RunLog | None:
    """The log in the newest checkpoint that has one."""
    for path in numbered(folder).values():
        state = read_json(path / "trainer_state.json")
        if isinstance(state, dict) and isinstance(state.get("log_history"), list):
            history = [line for line in state["log_history"] if isinstance(line, dict)]
            entries = [Entry(line["step"], None, line) for line in history if isinstance(line.get("step"), int)]
            steps = state.get("max_steps")
            return RunLog(tuple(entries), steps if isinstance(steps, int) else 0)
    return None
