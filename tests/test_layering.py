"""Who may import whom, read from the source: pure maths at the bottom, one file that knows TRL's private names."""

import ast
import sys
from pathlib import Path

import pytest

import grpo_plus

PACKAGE = Path(grpo_plus.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
HUGGING_FACE = {"trl", "transformers", "accelerate", "datasets", "peft"}
PURE = (
    "registry.py",
    "described.py",
    "reductions.py",
    "sampling.py",
    "advantages/",
    "losses/",
    "diagnostics/metrics.py",
    "compare/columns.py",
    "compare/comparison.py",
    "compare/curves.py",
    "compare/figures.py",
    "compare/files.py",
    "compare/intervals.py",
    "compare/plan.py",
    "compare/replay.py",
    "compare/replay_report.py",
    "compare/report.py",
    "compare/result.py",
    "compare/rollouts.py",
    "compare/statistics.py",
    "compare/store.py",
    "compare/svg.py",
    "compare/training_report.py",
    "compare/training_rows.py",
    "compare/verdict.py",
    "packing/layout.py",
    "packing/regroup.py",
)
FAMILIES = {
    "advantages": ("batch", "group", "multi_reward", "unnormalized"),
    "losses": ("clipped", "covariance", "reweighted", "sequence", "smooth"),
}
KNOWS_TRL = ("_trl.py", "config.py", "config_loss.py", "config_speed.py", "contract.py", "cli/train.py")
PUBLIC_TRL_MODULES = {"trl", "trl.scripts.grpo", "trl.rewards"}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(path: Path) -> set[str]:
    """Every module that the file imports, at its top or inside a function."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def roots(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported(path)}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_pure_files_import_torch_and_the_standard_library(path):
    if relative(path).startswith(PURE):
        assert not roots(path) & HUGGING_FACE


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").rglob("*.py")), ids=relative)
def test_kernels_import_torch_the_standard_library_and_kernels(path):
    triton = {"triton"} if path.name == "triton.py" else set()
    assert roots(path) <= {"torch", "grpo_plus"} | triton | sys.stdlib_module_names
    assert all(module.startswith("grpo_plus.kernels.") for module in imported(path) if module.startswith("grpo_plus"))


@pytest.mark.parametrize("path", sorted((PACKAGE / "planner").rglob("*.py")), ids=relative)
def test_the_planner_imports_the_standard_library_and_itself(path):
    # Reading a config off the hub aside, which happens inside a function.
    allowed = {"grpo_plus", "huggingface_hub"} | sys.stdlib_module_names
    assert roots(path) <= allowed
    ours = {module for module in imported(path) if module.startswith("grpo_plus")}
    assert all(module.startswith(("grpo_plus.planner", "grpo_plus.registry")) for module in ours)
    top = {node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)}
    assert not any((module or "").startswith("huggingface_hub") for module in top)


@pytest.mark.parametrize("name", ["report", "svg", "figures", "curves"])
def test_a_report_knows_nothing_of_what_it_reports(name):
    ours = {module for module in imported(PACKAGE / "compare" / f"{name}.py") if module.startswith("grpo_plus")}
    assert all(module.startswith(("grpo_plus.compare.report", "grpo_plus.compare.svg")) for module in ours)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_trl_is_imported_where_it_belongs(path):
    modules = {module for module in imported(path) if module.partition(".")[0] == "trl"}
    if relative(path) not in KNOWS_TRL:
        assert not modules
    assert all(module in PUBLIC_TRL_MODULES or module.rpartition(".")[0] in PUBLIC_TRL_MODULES for module in modules)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_seam_reads_private_attributes_of_a_trainer(path):
    if relative(path) == "_trl.py":
        return
    private = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).split(".")[-1] in {"trainer", "GRPOTrainer", "super()"}
    }
    assert not private


@pytest.mark.parametrize(("package", "family"), [(package, name) for package in FAMILIES for name in FAMILIES[package]])
def test_a_family_does_not_import_another(package, family):
    siblings = {f"grpo_plus.{package}.{sibling}" for sibling in FAMILIES[package]}
    assert not imported(PACKAGE / package / f"{family}.py") & siblings


def test_losses_and_advantages_do_not_import_each_other():
    for package, other in (("losses", "advantages"), ("advantages", "losses")):
        for path in (PACKAGE / package).glob("*.py"):
            assert not any(module.startswith(f"grpo_plus.{other}") for module in imported(path))


def test_there_is_no_cycle():
    # The package's own __init__ imports lazily, on attribute access.
    modules = {module_name(path): path for path in FILES if path != PACKAGE / "__init__.py"}
    graph = {name: imported(path) & set(modules) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done or module not in graph:
            return
        for needed in graph[module]:
            visit(needed, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
