"""The wheel and the sdist: they build, hold what they should, and install into an empty environment."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import grpo_plus

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_wheel_holds_the_package_and_its_data(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {"grpo_plus/py.typed", "grpo_plus/trainer/trl_fingerprints.json", "grpo_plus/report/page.html.jinja"}
    assert data | {"grpo_plus/report/page.css", "grpo_plus/advantages/group.py"} <= names
    assert [name for name in names if name.startswith(("tests/", "examples/"))] == []


def test_the_sdist_holds_the_tests_and_examples(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "tests/conftest.py", "docs/choosing.md"} <= names
    assert {
        "CONTRIBUTING.md",
        "SECURITY.md",
        "RELEASE.md",
        "CITATION.cff",
        "mkdocs.yml",
        ".github/workflows/ci.yml",
    } <= names


def test_the_wheel_installs_into_an_empty_environment(dist, tmp_path):
    venv.create(tmp_path)
    (wheel,) = dist.glob("*.whl")
    binaries = tmp_path / "bin"
    # This environment's pip: to put another one there takes longer than all else.
    pip = [sys.executable, "-m", "pip", "--python", binaries / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True)
    done = subprocess.run([binaries / "grpo-plus", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"grpo-plus {grpo_plus.__version__}\n"
