"""`make audit`: licenses of what runs, and answers of pip-audit, in whose place stands a program that prints them."""

import json

import pytest

from tests import audit
from tests.base_only import declared, distributions

VULNERABLE = {"name": "jinja2", "version": "3.1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.6"]}]}
CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
UNKNOWN = {"name": "trl", "skip_reason": "Dependency not found on PyPI"}


def test_every_dependency_at_run_time_has_a_license_that_is_allowed():
    packages = distributions(declared("peft", "qlora", "real")).values()
    assert len(packages) > 40
    assert audit.refused_licenses(packages) == []


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("BSD License", True),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND ISC", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND (GPL-3.0-only OR Zlib)", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", True),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND (GPL-3.0-only OR SSPL-1.0)", False),
        ("", False),
    ],
)
def test_a_license_is_allowed_where_one_way_to_take_it_is(expression, allowed):
    assert audit.allowed(expression) is allowed


@pytest.mark.parametrize(
    ("packages", "status", "says"),
    [
        ([CLEAN], 0, "vulnerabilities: 0"),
        ([CLEAN, VULNERABLE], 1, "jinja2 3.1.0: PYSEC-1, mended in 3.1.6"),
        ([CLEAN, UNKNOWN], 2, "pypi knows nothing of 1 packages, such as trl"),
        ([VULNERABLE, UNKNOWN], 1, "pypi knows nothing of 1 packages, such as trl"),
        (None, 2, "pypi knows nothing of any package"),
    ],
)
def test_only_a_look_up_of_every_package_passes(tmp_path, monkeypatch, capsys, packages, status, says):
    program = tmp_path / "pip-audit"
    answer = "echo no network >&2" if packages is None else f"echo '{json.dumps({'dependencies': packages})}'"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.argv", ["audit", str(program)])
    assert audit.main() == status
    printed = capsys.readouterr()
    assert says in printed.out + printed.err
    assert ("no network" in printed.err) is (packages is None)


def test_a_package_without_a_license_is_named(monkeypatch):
    monkeypatch.setattr(audit, "license_of", lambda package: "" if package.name == "tqdm" else "MIT")
    assert audit.refused_licenses(distributions(declared()).values()) == ["tqdm: no license"]
