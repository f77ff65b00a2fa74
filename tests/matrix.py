"""Parts of the suite in environments of other versions than the pinned ones: `make matrix`.

    python -m tests.matrix           in every environment
    python -m tests.matrix lowest    in one of them; `make test` runs this one

An environment holds what differs from the one that runs this module, and takes the rest from there. torch is the same
everywhere: other versions are builds for CUDA, gigabytes each.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path
from xml.etree import ElementTree

from tests.base_only import ROOT, declared, make_base_environment

FOLDER = ROOT / ".venv" / "matrix"
KERNELS = ROOT / ".venv" / "kernels"
SHOWN = ("trl", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy")

# TRL 1.15 computes its loss in Triton only; without a GPU, Triton's interpreter runs it.
INTERPRETED = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS)}

MEETS_TRL = (
    "tests/contract", "tests/exactness", "tests/trainer/test_trainer.py", "tests/trainer/test_refills.py",
    "tests/test_mixture_of_experts.py", "tests/cli/test_train.py",
    "tests/qlora/test_precision.py::test_resuming_passed_adapters_with_a_reference_copy",
)  # fmt: skip
MEETS_THE_OTHERS = (
    "tests/models", "tests/packing/test_forms.py", "tests/packing/test_packer.py", "tests/qlora",
    "tests/rollout/test_equality.py", "tests/rollout/test_in_the_trainer.py", "tests/trainer/test_resuming.py",
)  # fmt: skip
NEEDS_NO_EXTRA = (
    "tests/advantages", "tests/callbacks", "tests/rewards", "tests/rollout/test_equality.py",
    "tests/trainer/test_evaluation.py", "tests/trainer/test_profile.py", "tests/trainer/test_rollouts.py",
    "tests/trainer/test_turns.py",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """What is laid over this environment, and what is run there.

    Attributes:
        requirements: what pip installs. None: a new environment of the base dependencies alone.
        tests: arguments of pytest.
        variables: of the environment, for the tests.
    """

    requirements: tuple[str, ...] | None
    tests: tuple[str, ...]
    variables: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """What became of an environment: versions by package, tests by outcome, and what it took."""

    versions: Mapping[str, str]
    tests: Mapping[str, int]
    install_s: float
    tests_s: float
    cpu_s: float

    @property
    def green(self) -> bool:
        """Whether tests ran, and all passed."""
        return self.tests["passed"] > 0 and not self.tests["failed"]


def environments() -> dict[str, Environment]:
    """All environments by name."""
    ranges = {found.name: found for found in declared("peft", "qlora") if found.name != "torch"}
    floors = {
        name: next(each.version for each in found.specifier if each.operator == ">=") for name, found in ranges.items()
    }
    lowest = {name: f"{name}=={floor}" for name, floor in floors.items()}
    newest = {name: f"{name}{found.specifier}" for name, found in ranges.items()}
    every = (*MEETS_TRL, *MEETS_THE_OTHERS)
    once = ("-m", "not newest_trl", *MEETS_TRL)
    return {
        "lowest": Environment(tuple(lowest.values()), once, INTERPRETED),
        "lowest-but-trl": Environment(tuple((lowest | {"trl": f"trl=={version('trl')}"}).values()), every, {}),
        "newest": Environment(tuple(newest.values()), every, {}),
        "newest-but-trl": Environment(tuple((newest | {"trl": lowest["trl"]}).values()), once, INTERPRETED),
        "base": Environment(None, NEEDS_NO_EXTRA, {}),
    }


def run(name: str, environment: Environment) -> Outcome:
    """Make the environment, or bring it up to date, and run its tests."""
    folder = FOLDER / name
    started = time.monotonic()
    python = _base(folder) if environment.requirements is None else _laid_over(folder, environment.requirements)
    installed, cpu = time.monotonic(), _children_s()
    results = folder / "results.xml"
    results.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", f"--junit-xml={results}"]
    subprocess.run([*command, *environment.tests], cwd=ROOT, env={**os.environ, **environment.variables})
    return Outcome(
        _versions(python), counts(results), installed - started, time.monotonic() - installed, _children_s() - cpu
    )


def _base(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return make_base_environment(folder, "pytest", "pytest-xdist", "hypothesis")


def _laid_over(folder: Path, requirements: tuple[str, ...]) -> Path:
    """An environment whose own packages hide those of this environment. pip counts the latter as installed."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(get_path("purelib", "venv", {"base": str(folder)}))
    (packages / "laid_over.pth").write_text(f"{get_path('purelib')}\n{ROOT}\n", encoding="utf-8")
    same_torch = folder / "constraints.txt"
    same_torch.write_text(f"torch=={version('torch')}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--upgrade", "--constraint", same_torch]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip cannot install {' '.join(requirements)}:\n{done.stderr[-3000:]}")
    return python


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _versions(python: Path) -> dict[str, str]:
    code = (
        "from importlib.metadata import distributions\n"
        "for found in reversed(list(distributions())): print(found.name.lower(), found.version)"
    )
    lines = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)  # of two with one name, the first is the one that is imported


def counts(results: Path) -> dict[str, int]:
    """Tests by outcome, from the file that pytest wrote."""
    if not results.exists():  # pytest did not get so far
        return {"passed": 0, "failed": 1}
    suite = ElementTree.parse(results).getroot()[0]
    of = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = of["failures"] + of["errors"]
    return {"passed": of["tests"] - failed - of["skipped"], "failed": failed}


def table(outcomes: Mapping[str, Outcome]) -> str:
    """A line per environment."""
    header = ("environment", *SHOWN, "passed", "failed", "install", "tests", "CPU")
    rows = [
        (
            name,
            *(found.versions.get(package, "none") for package in SHOWN),
            *(str(found.tests[outcome]) for outcome in ("passed", "failed")),
            *(f"{seconds:.0f} s" for seconds in (found.install_s, found.tests_s, found.cpu_s)),
        )
        for name, found in outcomes.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
    )


def main() -> int:
    """Run the environments that were named, or all; print the table. Exit status 1 where a test failed."""
    known = environments()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}. Default: all")
    names = parser.parse_args().names or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no environment is called {unknown[0]!r}. Write one of {', '.join(known)}")
    outcomes = {name: run(name, known[name]) for name in names}
    print(f"\n{table(outcomes)}\n\ntorch {version('torch')} and Python {sys.version.split()[0]} everywhere")
    return 0 if all(found.green for found in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
