"""vLLM's stand-in for the tests of this process: the package in `vllm/`, and a server that answers TRL's client."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl.generation import vllm_client, vllm_generation


@contextmanager
def environment_kept() -> Iterator[None]:
    """TRL says in the environment, for vLLM to read, that this is one of several processes. Later trainers read it, too."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def installed() -> Iterator[None]:
    """As if vLLM were installed: TRL asks for it again, and finds the stand-in."""
    before = {module: dict(vars(module)) for module in (vllm_client, vllm_generation)}
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        for module in before:
            importlib.reload(module)
        yield
    finally:
        sys.path.pop(0)
        for module, names in before.items():
            vars(module).clear()
            vars(module).update(names)
        for name in [
            name for name in sys.modules if name.split(".")[0] == "vllm" or name.endswith("trainer.vllm.engine")
        ]:
            del sys.modules[name]
