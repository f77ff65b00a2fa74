"""The versions that a result depends on."""

import platform
from importlib.metadata import version

from grpo_plus import __version__


def versions(*others: str) -> dict[str, str]:
    """Of this package, of what trains, of Python, and of the packages in `others`."""
    packages = {name: version(name) for name in ("trl", "transformers", "torch", *others)}
    return {"grpo_plus": __version__, **packages, "python": platform.python_version()}
