import pytest

from grpo_plus.report.files import write_files


def test_a_failed_write_leaves_the_old_files(tmp_path):
    write_files(tmp_path, {"a": lambda p: p.write_text("old"), "b": lambda p: p.write_text("old")})

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path, {"a": lambda p: p.write_text("new"), "b": fail})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}
