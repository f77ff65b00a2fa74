"""Which checkpoint a run can resume from, and why not from another.

| folder | resume_from_checkpoint=True | named |
|---|---|---|
| matches its manifest | taken | taken |
| was not written to its end, or has changed since | passed over, with a warning | refused |
| ours, and its manifest was deleted | passed over, with a warning | taken unchecked, with a warning |
| of stock TRL | taken unchecked, with a warning | taken unchecked, with a warning |
"""

import json
import logging
import shutil
import zipfile
from collections.abc import Container, Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from grpo_plus.report.run_file import numbered
from grpo_plus.trainer.saving.manifest import MANIFEST, SENTINEL, UNFINISHED, manifest_of, mismatch

STATE_FILE = "grpo_plus_state.json"
OURS = "grpo_plus_*"

# What a run starts anew, in silence, where a checkpoint lacks it. FSDP and DeepSpeed have folders instead of files.
NEEDED = {
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}

# What transformers reads of trainer_state.json without looking at it first.
STATE_KINDS: dict[str, Any] = {"epoch": (int, float, NoneType), "log_history": list, "stateful_callbacks": dict}

logger = logging.getLogger("grpo_plus")


def why_unusable(folder: Path) -> str | None:
    """What is wrong with a checkpoint, with the name of the file; None for a checkpoint to go on from."""
    if not folder.is_dir():
        return "is no folder"
    try:
        manifest = manifest_of(folder)
    except ValueError as error:
        return str(error)
    if manifest is not None:
        return mismatch(folder, manifest)
    for mark in (UNFINISHED, SENTINEL):
        if (folder / mark).exists():
            return f"has no {MANIFEST}, which is written last: its saving was interrupted"
    return _damaged_trainer_state(folder / TRAINER_STATE_NAME) or _damaged_file(folder)


def chosen_checkpoint(asked: Literal[True] | str | Path, output_dir: str | Path) -> Path:
    """The folder that `resume_from_checkpoint` means. Says what was not checked.

    Args:
        asked: True for the newest checkpoint to go on from, or a folder.

    Raises:
        ValueError: there is none, or the folder is damaged. The message names the file and another checkpoint.
    """
    folder = _newest(Path(output_dir)) if asked is True else _named(Path(asked))
    manifest = manifest_of(folder)
    if manifest is None:
        lost = [name for name, patterns in NEEDED.items() if not any(any(folder.glob(p)) for p in patterns)]
        without = f" It has no {' and no '.join(lost)}: what was in there starts anew." if lost else ""
        logger.warning(f"{folder} has no {MANIFEST}: nobody checked whether its files are whole.{without}")
    elif manifest.get("save_only_model"):
        logger.warning(
            f"{folder} was saved with save_only_model=True. The optimizer, the learning rate's schedule and the random "
            "states start anew, so the run goes on otherwise than it would have."
        )
    return folder


def saved_state(folder: str | Path) -> dict[str, Any]:
    """Our own state in a checkpoint; {} where there is none.

    Raises:
        ValueError: the file holds no dictionary.
    """
    path = Path(folder) / STATE_FILE
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} is damaged: it must hold a JSON dictionary. Resume from an older checkpoint, or delete the file "
            "to go on without what the estimator remembers."
        )
    return state


def write_state(folder: Path, running: str) -> None:
    """Write the hook's `running_state`, as JSON; no file where there is none."""
    if running != "{}":
        (folder / STATE_FILE).write_text(running, encoding="utf-8")


def rotate(output_dir: Path, limit: int | None, *, keep: Container[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit`, but none of `keep`. None or 0: delete nothing.

    transformers does it before a checkpoint is sealed, and by a function that its older versions lack.
    """
    if not limit or limit < 0:
        return
    folders = sorted(numbered(output_dir).values(), key=lambda path: path.stat().st_mtime)
    others = [folder for folder in folders if folder not in keep]
    kept = len(folders) - len(others)
    for folder in others[: max(len(folders) - max(limit, kept), 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _newest(output_dir: Path) -> Path:
    passed_over: list[str] = []
    for folder, reason in _judged(numbered(output_dir).values()):
        if reason is None:
            for text in passed_over:
                logger.warning(f"{text}. Resuming from {folder}.")
            return folder
        passed_over.append(f"{folder} {reason}")
    found = f": {'; '.join(passed_over)}" if passed_over else ""
    raise ValueError(
        f"resume_from_checkpoint=True, but output_dir={str(output_dir)!r} has no checkpoint to go on from{found}. "
        "Leave resume_from_checkpoint unset to start from the beginning."
    )


def _named(folder: Path) -> Path:
    reason = why_unusable(folder)
    if reason is None:
        return folder
    step = next((step for step, path in numbered(folder.parent).items() if path.name == folder.name), 0)
    older = (path for number, path in numbered(folder.parent).items() if number < step)
    before = next((path for path, problem in _judged(older) if problem is None), None)
    instead = f"Resume from {str(before)!r}" if before else "No older checkpoint beside it is whole: start anew"
    unchecked = f", or delete {MANIFEST} to resume unchecked" if (folder / MANIFEST).exists() else ""
    raise ValueError(f"resume_from_checkpoint={str(folder)!r} {reason}. {instead}{unchecked}.")


def _judged(folders: Any) -> Iterator[tuple[Path, str | None]]:
    """Each folder and why the run does not choose it by itself."""
    for folder in folders:
        reason = why_unusable(folder)
        if reason is None and not (folder / MANIFEST).exists() and any(folder.glob(OURS)):
            reason = f"has no {MANIFEST} (name the folder to resume unchecked)"
        yield folder, reason


def _damaged_trainer_state(path: Path) -> str | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"has no {path.name}"
    except ValueError:
        return f"has a {path.name} that is cut off"
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int):
        return f"has a {path.name} without the step that it was saved at"
    wrong = [name for name, kind in STATE_KINDS.items() if name in state and not isinstance(state[name], kind)]
    if wrong:
        return f"has a {path.name} with a {wrong[0]} that is damaged"
    unknown = sorted(state.keys() - {entry.name for entry in fields(TrainerState)})
    return f"has a {path.name} with {unknown[0]!r}, which transformers does not know" if unknown else None


def _damaged_file(folder: Path) -> str | None:
    """The first file of weights or states that was cut off or is something else: all that shows without a manifest."""
    for path in sorted(folder.iterdir()):
        saved = path.suffix in (".pt", ".pth", ".bin") and not path.match(OURS)
        if saved and not (zipfile.is_zipfile(path) or _head(path, 1) == b"\x80"):  # an archive, or an old pickle
            return f"has a {path.name} that is damaged"
        if path.suffix == ".safetensors" and not _is_whole(path):
            return f"has a {path.name} that is damaged"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file of weights is as long as its own header says."""
    start = 8 + int.from_bytes(_head(path, 8), "little")
    size = path.stat().st_size
    try:
        tensors = json.loads(_head(path, start)[8:]) if 8 < start <= size else None
    except ValueError:
        return False
    if not isinstance(tensors, dict):
        return False
    ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    return size == start + max(ends, default=0)


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)
