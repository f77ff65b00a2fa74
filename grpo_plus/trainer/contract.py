"""Whether the installed TRL is still the one that the seam was written against: its methods' parameters and code.

`trl_fingerprints.json` holds both for every tested version; `grpo-plus doctor` compares on the user's machine.
"""

import ast
import hashlib
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from typing import Any, TypedDict

from packaging.version import Version
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from grpo_plus.trainer.names import RELIED_ON, RELIED_ON_FOR_VLLM


class Fingerprint(TypedDict):
    """What is compared of one method. `code` is None for a method that TRL inherits from transformers."""

    parameters: list[str]
    code: str | None


def fingerprint(function: Callable[..., Any]) -> Fingerprint:
    """Parameter names, and a sha256 of the code without comments, docstring and blank lines.

    Text and not `ast.dump`, whose output differs between Python versions. A method of transformers has no code here,
    because one version of TRL runs with many of transformers.
    """
    function = inspect.unwrap(function)
    inherited = function.__module__.startswith("transformers.")
    code = None if inherited else hashlib.sha256(_bare_code(function).encode()).hexdigest()
    return {"parameters": list(inspect.signature(function).parameters), "code": code}


def fingerprints() -> dict[str, Fingerprint]:
    """Of what is relied on and the installed TRL still has. Methods of GRPOTrainer stand without its name."""
    wanted = [(GRPOTrainer, "", name) for name in RELIED_ON]
    for owner in (VLLMGeneration, VLLMClient):
        wanted += [(owner, f"{owner.__name__}.", name) for name in RELIED_ON_FOR_VLLM[owner.__name__]]
    return {prefix + name: fingerprint(getattr(owner, name)) for owner, prefix, name in wanted if hasattr(owner, name)}


def known_fingerprints() -> dict[str, dict[str, Fingerprint]]:
    """TRL version -> method -> fingerprint, for the versions that the suite runs on."""
    return json.loads(files("grpo_plus.trainer").joinpath("trl_fingerprints.json").read_text())


def reference_version(installed: str) -> str:
    """The tested version to compare with: the installed one, else the newest below it, else the oldest."""
    tested = sorted(known_fingerprints(), key=Version)
    not_newer = [known for known in tested if Version(known) <= Version(installed)]
    return not_newer[-1] if not_newer else tested[0]


def check_seam() -> list[str]:
    """What differs between the installed TRL and the tested one, one sentence each; empty if nothing does."""
    reference = reference_version(version("trl"))
    found = fingerprints()
    return [
        f"{'' if '.' in name else 'GRPOTrainer.'}{name} {_difference(expected, found.get(name))} since trl {reference}."
        for name, expected in known_fingerprints()[reference].items()
        if expected != found.get(name)
    ]


def _difference(expected: Fingerprint, found: Fingerprint | None) -> str:
    if found is None:
        return "is gone"
    if expected["parameters"] != found["parameters"]:
        return f"takes {', '.join(found['parameters'])} instead of {', '.join(expected['parameters'])}"
    return "has changed its code"


def _bare_code(function: Callable[..., Any]) -> str:
    source = textwrap.dedent(inspect.getsource(function))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        docstring = definition.body[0]
        lines[docstring.lineno - 1 : docstring.end_lineno] = []
    return "\n".join(line.rstrip() for line in lines if line.strip())
