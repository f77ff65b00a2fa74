"""Which checkpoint a run can resume from: a process that is killed while it saves leaves a folder that looks complete.

transformers writes trainer_state.json last. `GRPOPlusTrainer` removes an old trainer_state.json from a folder before it
saves there, and writes its own file before transformers begins. A folder with a readable trainer_state.json is
therefore complete, but for the random states of other processes: the first process does not wait for them. A run that
is killed in between resumes with other random draws on these processes, and transformers says so.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "grpo_plus_state.json"

logger = logging.getLogger("grpo_plus")


def why_unfinished(folder: str | Path) -> str | None:
    """What is missing from a checkpoint; None where it is complete."""
    path = Path(folder) / TRAINER_STATE_NAME
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"has no {TRAINER_STATE_NAME}, which is written last"
    except ValueError:
        return f"has a {TRAINER_STATE_NAME} that is cut off"
    return None


def begin_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Make the folder, with our own state in it.

    Whatever the folder held, it is no complete checkpoint before the next one is saved there to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    if state:
        (folder / STATE_FILE).write_text(json.dumps(state))


def saved_state(folder: str | Path) -> dict[str, Any]:
    """Our own state in a checkpoint; {} where there is none."""
    path = Path(folder) / STATE_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def refuse_unfinished(folder: str | Path) -> None:
    """Raise ValueError for a checkpoint that a run cannot go on from, with what is missing."""
    if reason := why_unfinished(folder):
        raise ValueError(f"resume_from_checkpoint={str(folder)!r} {reason}. Choose an older checkpoint.")


def last_finished(output_dir: str | Path) -> Path:
    """The newest complete checkpoint; one warning for each newer one that is not.

    Raises:
        ValueError: there is none.
    """
    passed_over: list[str] = []
    for folder in _newest_first(Path(output_dir)):
        reason = why_unfinished(folder)
        if reason is None:
            for text in passed_over:
                logger.warning(f"{text}: its saving was interrupted. Resuming from {folder}.")
            return folder
        passed_over.append(f"{folder} {reason}")
    found = f": {'; '.join(passed_over)}" if passed_over else ""
    raise ValueError(
        f"resume_from_checkpoint=True, but output_dir={str(output_dir)!r} has no complete checkpoint{found}. Leave "
        "resume_from_checkpoint unset to start from the beginning."
    )


def _newest_first(output_dir: Path) -> list[Path]:
    numbered = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {path: numbered.fullmatch(path.name) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return sorted((path for path, step in steps.items() if step), key=lambda path: -int(str(path).rpartition("-")[2]))
