"""`make matrix`: what its environments hold, and what it says of them. The environments themselves run elsewhere."""

import pytest
from packaging.requirements import Requirement

from tests import matrix
from tests.base_only import ROOT, declared

GREEN = matrix.Outcome({"trl": "1.16.0"}, {"passed": 3, "failed": 0}, 20.0, 61.2, 90.0)
RED = matrix.Outcome({"trl": "1.15.0"}, {"passed": 2, "failed": 1}, 20.0, 61.2, 90.0)
XML = '<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>'


def requirements(name: str) -> dict[str, Requirement]:
    asked = matrix.environments()[name].requirements
    assert asked is not None
    return {found.name: found for found in map(Requirement, asked)}


def test_the_lowest_environment_has_the_lower_bound_of_every_range():
    ranges = {found.name: found.specifier for found in declared("peft", "qlora")}
    lowest = requirements("lowest")
    assert ranges.keys() - lowest.keys() == {"torch"}
    assert {"trl", "transformers", "peft", "bitsandbytes"} <= lowest.keys()
    for name, found in lowest.items():
        (pin,) = found.specifier
        assert pin.operator == "=="
        assert f">={pin.version}" in str(ranges[name])


def test_either_trl_meets_the_lowest_and_the_newest_of_all_else():
    pins = {name: str(requirements(name)["trl"].specifier) for name in matrix.environments() if name != "base"}
    assert pins == {
        "lowest": "==1.15", "lowest-but-trl": f"=={matrix.version('trl')}", "newest": "<1.17,>=1.15", "newest-but-trl": "==1.15"
    }  # fmt: skip


def test_what_the_environments_run_exists():
    paths = {path for each in matrix.environments().values() for path in each.tests if path.startswith("tests/")}
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path.partition("::")[0]).exists()] == []


@pytest.mark.parametrize(
    ("outcome", "status"), [(GREEN, 0), (RED, 1), (matrix.Outcome({}, {"passed": 0, "failed": 0}, 1, 1, 1), 1)]
)
def test_a_failed_test_and_a_run_without_tests_fail_the_matrix(monkeypatch, capsys, outcome, status):
    monkeypatch.setattr(matrix, "run", lambda name, environment: outcome)
    monkeypatch.setattr("sys.argv", ["matrix", "lowest", "base"])
    assert matrix.main() == status
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == ["environment", "lowest", "base"]


def test_the_table_has_a_line_per_environment():
    header, line = matrix.table({"base": RED}).splitlines()
    assert header.split() == ["environment", *matrix.SHOWN, "passed", "failed", "install", "tests", "CPU"]
    assert line.split() == ["base", "1.15.0", *["none"] * 6, "2", "1", "20", "s", "61", "s", "90", "s"]


def test_errors_count_as_failures_and_skips_as_nothing(tmp_path):
    (tmp_path / "results.xml").write_text(XML)
    assert matrix.counts(tmp_path / "results.xml") == {"passed": 3, "failed": 3}
    assert matrix.counts(tmp_path / "none.xml") == {"passed": 0, "failed": 1}


def test_an_unknown_environment_is_answered_with_the_names(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["matrix", "low"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "no environment is called 'low'. Write one of lowest, lowest-but-trl, newest," in capsys.readouterr().err
