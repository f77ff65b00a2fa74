"""The version of this package, and of everything else that a result depends on."""

import platform
from functools import cache
from importlib import metadata

__version__ = "0.2.0"


def versions(*others: str) -> dict[str, str]:
    """Versions of this package, of what trains, of Python, and of the packages in `others`."""
    packages = {name: _version(name) for name in ("trl", "transformers", "torch", *others)}
    return {"grpo_plus": __version__, **packages, "python": platform.python_version()}


@cache
def _version(package: str) -> str:
    """Of an installed package. It is read from a file, which each training of a comparison would read again."""
    return metadata.version(package)
