"""The user's own modules: found in the working directory, after everything installed, and by the names typed only.

A folder that somebody sent may hold a `matplotlib.py`. With the folder in front of `sys.path`, every import of
matplotlib would run that file. So `sys.path` stays as it is. A finder behind all others looks into the working
directory for two kinds of modules: the first part of a dotted path that the user typed, and whatever a module of the
first kind imports from beside itself.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType, ModuleType


class OwnModules:
    """A finder of modules in one folder.

    Attributes:
        allowed: names of modules that the user typed.
        found: names of modules that this finder has found; these may import others from the folder.
    """

    def __init__(self, folder: str, allowed: set[str]) -> None:
        self.folder = folder
        self.allowed = allowed
        self.found: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's place in the folder; None for a name that nobody may import from there."""
        if path is not None or not (name in self.allowed or _importer(sys._getframe(1)) in self.found):
            return None
        spec = PathFinder.find_spec(name, [self.folder], target)
        if spec is not None:
            self.found.add(name)
        return spec


def _importer(frame: FrameType | None) -> str:
    """The top-level module whose statement imports."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__")).partition(".")[0]
        if name != "importlib":
            return name
        frame = frame.f_back
    return ""


def search_own_modules(typed: Iterable[str | None]) -> None:
    """Let the dotted paths among `typed` name modules in the working directory.

    Args:
        typed: words from the command line or a configuration file. None, and a word without a dot, name no module.
    """
    allowed = {word.partition(".")[0] for word in typed if word and "." in word}
    if not allowed:
        return
    importlib.invalidate_caches()
    for finder in sys.meta_path:
        if isinstance(finder, OwnModules) and finder.folder == os.getcwd():
            finder.allowed |= allowed
            return
    sys.meta_path.append(OwnModules(os.getcwd(), allowed))


def leave_the_working_directory() -> None:
    """Drop the entry that `python -m` has put in front of `sys.path`: the working directory is searched as above."""
    if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.getcwd()):
        del sys.path[0]
