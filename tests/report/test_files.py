import pyarrow as pa
import pytest

from grpo_plus.report.files import without_formulas, write_files


def test_a_failed_write_leaves_the_old_files(tmp_path):
    write_files(tmp_path, {"a": lambda p: p.write_text("old"), "b": lambda p: p.write_text("old")})

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path, {"a": lambda p: p.write_text("new"), "b": fail})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


def test_a_text_that_a_spreadsheet_would_run_is_marked_as_text():
    formulas = ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "|x", "%x", " \t=1", "\u200b=1", "\uff1d1", "\ufeff=1"]
    plain = ["a=b", "", "1-2", "grpo", "'=1", None]
    table = pa.table({"name": formulas + plain, "value": [float(n) for n in range(16)]})
    marked = without_formulas(table)
    assert marked["name"].to_pylist() == [f"'{text}" for text in formulas] + plain
    assert marked["value"] == table["value"]
