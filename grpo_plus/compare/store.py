"""The folder of a comparison: what was asked for, and one folder per arm, whose result is written last.

    comparison.json                what all arms share: task, facts, configuration
    start/result.json              the start: fingerprint, held-out scores, gradients
    start/samples.json             what the start answers to a few held-out prompts
    arms/<arm>/arm.json            the arm, as it was begun
    arms/<arm>/log.jsonl           what the trainer logged
    arms/<arm>/samples.json        what the arm answers to the same prompts
    arms/<arm>/result.json         scores and costs; where it exists, the arm is finished
    arms/<arm>/error.txt           the traceback of an arm that failed

Each of a comparison's processes holds a lock on the arm that it trains; the system drops it with the process.
"""

import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grpo_plus.report.files import write_files
from grpo_plus.report.secrets import masked

RESULT, LOG, SAMPLES, ERROR, LOCK = "result.json", "log.jsonl", "samples.json", "error.txt", "lock"
ABSENT = "nothing"


class OtherComparisonError(ValueError):
    """A folder that holds a comparison of something else."""


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold `folder` for this process; False where another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with lock:
        yield True


def agree(path: Path, wanted: Mapping[str, Any], what: str) -> None:
    """Check that the file says what is wanted; write it where there is none.

    Raises:
        OtherComparisonError: it says something else; names what differs.
    """
    check(path, wanted, what)
    kept = read_json(path) if path.exists() else None
    clean = as_json(wanted) if kept is None else masked(kept)  # an earlier release may have written a token
    if clean != kept:
        write_json(path.parent, {path.name: clean})


def check(path: Path, wanted: Mapping[str, Any], what: str) -> None:
    """`agree` without writing anything. Another token is no other comparison."""
    if not path.exists():
        return
    there, here = _flattened(masked(read_json(path))), _flattened(as_json(wanted))
    differing = [
        f"{name}: {there.get(name, ABSENT)} there, {here.get(name, ABSENT)} here"
        for name in sorted({*there, *here})
        if there.get(name, ABSENT) != here.get(name, ABSENT)
    ]
    if differing:
        raise OtherComparisonError(
            f"{path.parent} holds {what} of another configuration ({'; '.join(differing)}). Choose another output "
            "directory, remove this one, or ask for what it holds."
        )


def begin(folder: Path) -> None:
    """Remove what an attempt that did not finish has left; the lock stays."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def read_json(path: Path) -> Any:
    """What a file of ours holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Remove the file to have it made again.") from error


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of an arm's log."""
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def write_json(folder: Path, files: Mapping[str, Any]) -> None:
    """Write objects as JSON, and lists of them as one line each; in the order given, each file whole or not at all."""
    write_files(folder, {name: functools.partial(_write, name=name, value=value) for name, value in files.items()})


def _write(path: Path, *, name: str, value: Any) -> None:
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(entry) + "\n" for entry in value)
    else:
        text = json.dumps(value, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def as_json(value: Any) -> Any:
    """The value as it comes back from a file, without secrets."""
    return masked(json.loads(json.dumps(value, default=str)))


def _flattened(values: Mapping[str, Any]) -> dict[str, str]:
    """The values as texts, those of an inner table one by one."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": text for inner, text in _flattened(value).items()}
        else:
            flat[name] = str(value)
    return flat
