"""What TRL, we and the stand-in use of vLLM, read from vLLM's own files, which nobody has to install.

Record a version by its sdist or wheel: `python -m tests.contract.vllm_interface vllm-0.31.0.tar.gz`.
"""

import ast
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_suffix(".json")
METHODS = ("__init__", "generate", "chat", "sleep", "wake_up", "reset_prefix_cache")
FIELDS_OF = (
    *("EngineArgs", "LoRARequest", "SamplingParams", "PEFTHelper", "CompletionRequest"),
    *("LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest"),
)
ROUTES = (
    *("/health", "/v1/models", "/server_info", "/v1/completions", "/reset_prefix_cache"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
)


def interface(sources: list[str]) -> dict[str, Any]:
    """Names, in the order of the files. Of a class its fields, of a method its parameters, of a route its verb."""
    (llm,) = _classes(sources, "LLM")
    methods = {node.name: node for node in llm.body if isinstance(node, ast.FunctionDef)}
    found: dict[str, Any] = {f"LLM.{name}": " ".join(_parameters(methods[name])) for name in METHODS}
    found |= {name: " ".join(_fields(*_classes(sources, name))) for name in FIELDS_OF}
    found["routes"] = " ".join(f"{verb} {route}" for verb, route in sorted(set(_routes(sources))))
    found["max_lora_rank"] = next(
        ast.literal_eval(f"[{match[1]}]")
        for text in sources
        if (match := re.search(r"MaxLoRARanks = Literal\[(.*)\]", text))
    )
    found["quantizes_in_flight"] = sorted(set(_in_flight(sources)))
    return found


def _classes(sources: list[str], name: str) -> list[ast.ClassDef]:
    texts = [text for text in sources if re.search(rf"^class {name}\b", text, re.MULTILINE)]
    nodes = [node for text in texts for node in ast.parse(text).body]
    return [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    rest = [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)] + rest


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        line.target.id for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]


def _routes(sources: list[str]) -> Iterator[tuple[str, str]]:
    """Of the decorators of the API's functions."""
    for text in sources:
        for match in re.finditer(r"""@router\.(get|post)\(\s*["']([^"']+)["']""", text):
            if match[2] in ROUTES:
                yield match[1].upper(), match[2]


def _in_flight(sources: list[str]) -> Iterator[str]:
    """How a base that is not quantized becomes one of 4 bits."""
    for text in sources:
        if "class BitsAndBytesModelLoader" in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "quantize_4bit":
                    yield from (ast.unparse(keyword) for keyword in node.keywords)


def _sources(archive: Path) -> list[str]:
    """The Python files of the package in an sdist or a wheel."""

    def wanted(name: str) -> bool:
        return re.fullmatch(r"(vllm-[^/]+/)?vllm/.*\.py", name) is not None

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return [wheel.read(name).decode() for name in wheel.namelist() if wanted(name)]
    with tarfile.open(archive) as sdist:
        files = [sdist.extractfile(member) for member in sdist if wanted(member.name)]
        return [file.read().decode() for file in files if file is not None]


def main(archive: str) -> None:
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    version = Path(archive).name.split("-")[1].removesuffix(".tar.gz")
    known[version] = interface(_sources(Path(archive)))
    RECORDED.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
    print(f"recorded vllm {version} in {RECORDED.name}")


if __name__ == "__main__":
    main(sys.argv[1])
