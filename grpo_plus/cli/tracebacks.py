"""The user's own part of a traceback: a bug in a reward function needs its line, an error of ours does not."""

import sysconfig
import traceback
from pathlib import Path
from types import FrameType, TracebackType

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = ("site-packages", "dist-packages")


def users_part(error: BaseException) -> str:
    """The traceback from the first line of the user's code on, with its own error; "" where no such line takes part.

    An error that was raised because of another one, as ours about a reward function are, is searched through to the
    first cause.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    for cause in reversed(seen):
        if (start := _first_of_users(cause.__traceback__)) is not None:
            lines = traceback.format_exception(type(cause), cause, start, chain=False)
            return "".join(lines).rstrip()
    return ""


def _first_of_users(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and not _is_users(trace.tb_frame):
        trace = trace.tb_next
    return trace


def _is_users(frame: FrameType) -> bool:
    """Whether the line stands in no installed package, not in Python's library, and not in this package."""
    name = frame.f_code.co_filename
    if name.startswith("<"):
        return False
    path = Path(name).resolve()
    libraries = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib")]
    inside = any(folder in path.parents for folder in (PACKAGE, *libraries))
    return not inside and set(INSTALLED).isdisjoint(path.parts) and not any(map(_is_pips, path.parents))


def _is_pips(folder: Path) -> bool:
    """Whether pip installed into the folder, as `pip install --target` does into any."""
    return next(folder.glob("*.dist-info"), None) is not None
