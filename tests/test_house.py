"""The rule of the house: a file may import its own room and rooms on lower floors, nothing else.

A room is a folder or a file at the top of the package. A new file is covered without being named anywhere.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import grpo_plus

PACKAGE = Path(grpo_plus.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "registry": 1,
    "version": 1,
    "kernels": 1,
    "models": 1,
    "report": 1,
    "advantages": 2,
    "losses": 2,
    "packing": 2,
    "planner": 2,
    "rewards": 2,
    "rollout": 2,
    "config": 3,
    "qlora": 3,
    "replay": 3,
    "callbacks": 3,
    "trainer": 4,
    "demo": 5,
    "compare": 5,
    "grpo_plus": 6,  # the package itself: the public names, loaded on first use
    "cli": 7,
    "__main__": 8,
}
# What a room may import from outside beside the standard library; a room that is not here, what the package needs.
OUTSIDE = {
    "registry": set(),
    "version": set(),
    "kernels": {"torch", "triton"},
    "models": {"torch", "transformers", "peft", "bitsandbytes"},
    "report": {"jinja2", "matplotlib", "numpy", "pyarrow"},
    "advantages": {"torch"},
    "losses": {"torch"},
    "rewards": set(),
    "rollout": {"torch", "transformers", "packaging"},
    "planner": {"torch", "huggingface_hub", "transformers", "peft"},
    "replay": {"torch", "numpy", "pyarrow", "matplotlib", "tqdm"},
}
KNOWS_TRL = {"config", "trainer", "cli"}
# TRL exports its classes for vLLM where vLLM is installed, and defines them everywhere.
VLLM_MODULES = {"trl.generation.vllm_client", "trl.generation.vllm_generation"}
PUBLIC_TRL_MODULES = {"trl", "trl.scripts.grpo", "trl.rewards", *VLLM_MODULES}
MAX_LINES, MAX_FUNCTION_LINES, MAX_ROOMS, MAX_FLOORS = 350, 60, 21, 8


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "grpo_plus" if first == "__init__.py" else first.removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room_of_module(module: str) -> str | None:
    """The room of a dotted name, which may be a name inside a module; None for what is not ours."""
    parts = module.split(".")
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return room(MODULES[".".join(parts)]) if parts else None


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: what stands under `if TYPE_CHECKING` does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (inner for statement in node.orelse for inner in (statement, *statements(statement)))
            continue
        yield node
        yield from statements(node)


@cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    """Every module that the file imports when it runs, at its top or inside a function."""
    modules: set[str] = set()
    for node in statements(parsed(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module or "" for name in found}
    return modules


def roots(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported(path)}


def upward(path: Path, own: str) -> list[str]:
    """What a file of the room `own` imports from another room that is not on a lower floor."""
    rooms = {module: room_of_module(module) for module in imported(path)}
    return sorted(m for m, other in rooms.items() if other not in (None, own) and FLOORS[other] >= FLOORS[own])


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set(FLOORS)
    assert len(FLOORS) <= MAX_ROOMS
    assert set(FLOORS.values()) == set(range(1, MAX_FLOORS + 1))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_imports_its_own_room_and_lower_floors(path):
    assert upward(path, room(path)) == []


def test_an_import_of_a_higher_floor_is_found(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "def late():\n    from grpo_plus.trainer import GRPOPlusTrainer\n    from grpo_plus import kernels\n"
    )
    assert upward(path, "losses") == ["grpo_plus.trainer"]


@pytest.mark.parametrize("path", [path for path in FILES if room(path) in OUTSIDE], ids=relative)
def test_a_room_that_knows_little_of_the_outside_stays_so(path):
    allowed = {"grpo_plus"} | OUTSIDE[room(path)] | sys.stdlib_module_names
    assert roots(path) <= allowed


def test_the_planner_needs_torch_for_a_model_that_is_loaded_or_built_only():
    assert [relative(path) for path in FILES if room(path) == "planner" and "torch" in roots(path)] == [
        "planner/built.py",
        "planner/decoder.py",
        "planner/loaded.py",
    ]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_trl_is_imported_by_its_public_names_and_where_it_belongs(path):
    modules = {module for module in imported(path) if module.partition(".")[0] == "trl"}
    assert not modules or room(path) in KNOWS_TRL
    assert modules <= PUBLIC_TRL_MODULES


@pytest.mark.parametrize("path", [path for path in FILES if room(path) != "trainer"], ids=relative)
def test_only_the_trainers_room_reads_private_attributes_of_a_trainer(path):
    private = {
        node.attr
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).split(".")[-1] in {"trainer", "GRPOTrainer", "super()"}
    }
    assert not private


def test_no_module_imports_itself_through_others():
    # The package's own __init__ imports lazily, on attribute access.
    graph = {name: imported(path) & set(MODULES) - {name, "grpo_plus"} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for needed in graph[module]:
                visit(needed, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_are_short_enough_to_hold_at_once(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    functions = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION_LINES]
    assert not long
