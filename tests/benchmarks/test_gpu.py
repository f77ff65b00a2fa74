"""The run on a GPU, rehearsed on the CPU: every stage runs, and what fails stays where it is."""

import json
import sys
import time

import pytest

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import record


def test_the_rehearsal_runs_every_line(tmp_path, monkeypatch):
    # The planner's stage starts processes, as tests/planner/test_benchmark.py does already.
    stages = [name for name in driver.SECONDS if name != "planner"]
    arguments = ["gpu", "--rehearse", "--repeats", "1", "--out", str(tmp_path), "--stages", *stages]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        driver.main()
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text)["stages"]
    assert [row["label"] for stage in found.values() for row in stage["rows"] if "failure" in row] == []
    assert ended.value.code == 0
    assert list(found) == stages
    exact = {row["label"]: row for row in found["exact"]["rows"]}
    assert exact["qwen3 sdpa float32"]["bad"] == []
    assert exact["qwen3 sdpa float32"]["shared_prompt (cascade attention)"][1] < 2e-5
    assert exact["greedy generation in chunks"]["equal"] == "8 of 8"
    rollouts = {row["label"].split(",")[0]: row for row in found["rollouts"]["rows"]}
    assert len(rollouts) == 4
    assert all(row["equal"] == "16 of 16" for row in rollouts.values())
    updates = {row["label"].split()[-1]: row for row in found["updates"]["rows"] if "s" in row}
    assert set(updates) == {"trl", "auto", "cascade", "cached", "rows", "cascade-lora", "cascade+torch"}
    assert all(row.get("gradient_error", 0) < 2e-5 for row in updates.values())
    assert str(tmp_path) not in text
    assert sys.prefix not in text


def test_an_item_that_fails_or_takes_too_long_is_a_row(tmp_path):
    kept = record.Record(tmp_path, "python -m benchmarks.gpu")
    stage = record.Stage("probe", kept)

    def fails():
        raise RuntimeError("no file /some/long/path/to/a.so here")

    stage.item("broken", fails)
    with pytest.raises(record.OutOfTimeError), record.at_most(0.5):
        stage.item("slow", time.sleep, 30)
    stage.item("well", lambda: {"ms": 1.0})
    rows = json.loads((tmp_path / "results.json").read_text())["stages"]["probe"]["rows"]
    assert [row.get("failure") for row in rows] == ["RuntimeError: no file to/a.so here", "out of time", None]
    assert rows[0]["trace"][-1].startswith("benchmarks/test_gpu.py:")
    assert rows[2]["ms"] == 1.0
