"""The manifest of a checkpoint: which files belong to it, with their sizes and hashes. It is written last.

A process can be killed at any moment of a save, and a disk can lose a part of a file. A folder that matches its
manifest was written to its end, and has not changed since.

    checkpoint-8/
      grpo_plus_unfinished       while the folder is being written; a kill leaves it behind
      grpo_plus_manifest.json    once everything else is on the disk
"""

import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

MANIFEST = "grpo_plus_manifest.json"
UNFINISHED = "grpo_plus_unfinished"
# transformers' own mark of a checkpoint that a signal asked for. It is removed after the save.
SENTINEL = "checkpoint-is-incomplete.txt"
FORMAT = 1


# What a checkpoint is made of. A file that an earlier save of the same step left would be loaded with the new ones.
WRITTEN = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_model.bin",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "entropy_ctrl_state.json",
    "grpo_plus_*",
)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def begin(folder: Path, keep: Container[str] = ()) -> None:
    """Mark the folder as unfinished, until `seal`, and empty it of an earlier checkpoint.

    Args:
        keep: names of files that stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The mark first, the manifest next: a kill in between leaves an earlier checkpoint whole, or known as unfinished.
    (folder / UNFINISHED).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    _sync(folder)
    for path in {path for pattern in WRITTEN for path in folder.glob(pattern)}:
        if path.is_file() and path.name != UNFINISHED and path.name not in keep:
            path.unlink()


def seal(folder: Path, **facts: Any) -> str | None:
    """Write the manifest, after every file of the folder has reached the disk. Returns `weights_sha256`.

    Args:
        facts: what else the manifest says, for JSON.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    for subfolder in {path.parent for path in _files(folder)}:
        _sync(subfolder)
    weights = weights_sha256(files)
    text = json.dumps({"format": FORMAT, **facts, "weights_sha256": weights, "files": files}, indent=1)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(folder / MANIFEST)
    _sync(folder)
    (folder / UNFINISHED).unlink(missing_ok=True)
    _sync(folder.parent)
    return weights


def weights_sha256(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """One hash of all weights: what `sha256sum *.safetensors | sha256sum` prints in the folder.

    It is made of hashes that the manifest has anyway, so no file is read for it. None where no file of the folder
    itself holds weights, as with weights that processes save in parts.

    Args:
        files: the manifest's, by name.
    """
    names = sorted(name for name in files if "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS))
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest() if names else None


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest's content; None where there is none.

    Raises:
        ValueError: the file is no manifest.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        content = None
    files = content.get("files") if isinstance(content, dict) else None
    if not files or not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"has a {MANIFEST} that is damaged")
    return content


def mismatch(folder: Path, manifest: dict[str, Any]) -> str | None:
    """What of the folder differs from its manifest, with the file's name; None where all is as it was written."""
    files: dict[str, dict[str, Any]] = manifest["files"]
    # Sizes first: they cost nothing, and a cut file is the usual case.
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"has lost {name}"
        if path.stat().st_size != entry.get("bytes"):
            return f"has a {name} of {path.stat().st_size} bytes, where {entry.get('bytes')} were written"
    for name, entry in files.items():
        if _sha256(folder / name) != entry.get("sha256"):
            return f"has a {name} that is not what was written: its hash differs"
    return None


def _files(folder: Path) -> Iterator[Path]:
    others = {MANIFEST, f"{MANIFEST}.partial", UNFINISHED, SENTINEL}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not (path.parent == folder and path.name in others):
            yield path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until the file, or the list of a folder's files, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and has no need to
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
