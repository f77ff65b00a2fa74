"""Tables that somebody may have sent: bounded, skipped or named, and never waited for."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_plus.replay import Rollouts, replay, write_replay
from grpo_plus.replay import tables as tables_module
from grpo_plus.replay.tables import TableError, read_table
from grpo_plus.report.files import read_json
from tests.replay.logs import table, write, write_rewards

REWARDS = {"r": [1.0, 0.0, 0.5, 0.25]}


@pytest.fixture
def log(tmp_path):
    """Two sound tables, at the steps 1 and 3."""
    for step in (1, 3):
        write_rewards(tmp_path, step, REWARDS, advantage=[0.5, -0.5, 0.125, -0.125])
    return tmp_path


def read(run_dir, **arguments):
    rollouts = Rollouts(run_dir, **arguments)
    steps = [batch.step for batch in rollouts.batches()]
    return steps, {kind: finding.first for kind, finding in rollouts.findings.items()}


def path_of(run_dir, step):
    return run_dir / "completions" / f"completions_{step:05d}.parquet"


def bomb(kind, rows):
    """Columns that pack to next to nothing."""
    text = "x" * 200_000
    messages = [[{"role": "assistant", "content": text}]] * rows
    completions = {"text": [text] * rows, "conversation": messages, "numbers": ["a"] * rows}[kind]
    return {"step": [2] * rows, "prompt": ["p"] * rows, "completion": completions, "r": np.zeros(rows)}


@pytest.mark.parametrize("where", [1, 2], ids=["first", "later"])
@pytest.mark.parametrize(("kind", "rows"), [("text", 400), ("conversation", 400), ("numbers", 2_000_000)])
def test_a_small_file_that_unpacks_to_much_is_left_out_before_it_is_read(log, monkeypatch, kind, rows, where):
    monkeypatch.setattr(tables_module, "LIMIT", 2**25)
    if where == 1:
        path_of(log, 1).unlink()
    pq.write_table(pa.table(bomb(kind, rows)), path_of(log, where), compression="zstd")
    assert path_of(log, where).stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    peak = pa.default_memory_pool().max_memory()
    steps, findings = read(log)
    assert steps == sorted({1, 3} - {where})
    assert findings["too large"].startswith(f"completions_0000{where}.parquet has")
    assert "would unpack to more than 33,554,432" in findings["too large"]
    assert pa.default_memory_pool().max_memory() <= max(peak, before + 2**27)


def test_long_texts_that_rows_share_are_counted_as_they_unpack(log, monkeypatch):
    """A dictionary of one long text, named by a few rows, is within the limit; the bound of its index is not."""
    monkeypatch.setattr(tables_module, "LIMIT", 2**21)
    monkeypatch.setattr(tables_module, "RATIO", 0)
    text = "x" * 100_000
    write_rewards(log, 2, REWARDS, prompt=[text] * 4)
    assert read(log)[0] == [1, 2, 3]
    monkeypatch.setattr(tables_module, "LIMIT", 2**18)
    assert read(log)[0] == [1, 3]


def test_a_long_text_in_a_column_that_nobody_reads_costs_nothing(log, monkeypatch):
    monkeypatch.setattr(tables_module, "LIMIT", 2**20)
    write_rewards(log, 2, REWARDS, notes=["x" * 2_000_000] * 4)
    assert read(log) == ([1, 2, 3], {})


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_left_out_and_named(log, kind):
    path = path_of(log, 2)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    steps, findings = read(log)
    assert steps == [1, 3]
    assert findings == {"no files": "completions_00002.parquet is a pipe, a device or a folder, and is left out"}


def test_a_pipe_in_place_of_a_checkpoints_log_is_not_waited_for(log):
    (log / "checkpoint-1").mkdir()
    os.mkfifo(log / "checkpoint-1" / "trainer_state.json")
    os.mkfifo(log / "grpo_plus_run.json")
    assert read(log)[0] == [1, 3]
    assert read_json(log / "grpo_plus_run.json") is None


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"log_history": 3}', "[]", "{", '{"log_history": [1, null, {}]}', "null"]
)
def test_a_log_of_a_checkpoint_that_is_something_else_is_passed_over(log, text):
    (log / "trainer_state.json").write_text(text)
    (log / "grpo_plus_run.json").write_text(text)
    assert read(log)[0] == [1, 3]


def test_a_column_that_is_there_twice_is_named(log):
    columns = table(REWARDS)
    names = ["step", "prompt", "completion", "r", "r"]
    twice = pa.table([pa.array(columns[name]) for name in names], names=names)
    pq.write_table(twice, path_of(log, 2))
    steps, findings = read(log)
    assert steps == [1, 3]
    assert findings["columns"] == "completions_00002.parquet has the column 'r' 2 times"
    pq.write_table(twice, path_of(log, 1))
    pq.write_table(twice, path_of(log, 3))
    with pytest.raises(ValueError, match="completions_00001.parquet has the column 'r' 2 times"):
        Rollouts(log)


BAD = [
    ("step", [1e300] * 4, "'step' cannot be used: it holds double"),
    ("step", ["two"] * 4, "'step' cannot be used: it holds"),
    ("advantage", ["high"] * 4, "'advantage' cannot be used: it holds"),
    ("completion_length", [1.0, -5.0, 2.0, 3.0], "'completion_length' cannot be used: it goes from -5 to 3"),
    ("completion_length", [1.0, 1e30, 2.0, 3.0], "'completion_length' cannot be used: it goes from 1 to 1e\\+30"),
    ("completion_length", [1.0, np.inf, 2.0, 3.0], "'completion_length' cannot be used: it goes from 1 to inf"),
    ("group", ["a", "a", "b", "b"], "'group' cannot be used: it holds"),
    ("r", ["good"] * 4, "'r' cannot be used: it holds"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "message"), BAD, ids=[f"{name}={values[1]}" for name, values, _ in BAD])
def test_a_column_with_something_else_is_named_with_its_file(log, name, values, message):
    columns = table(REWARDS, step=2) | {name: values}
    write(log, 2, columns)
    steps, findings = read(log)
    assert steps == [1, 3]
    assert findings.keys() == {"columns"}
    with pytest.raises(TableError, match=message):
        raise TableError("columns", findings["columns"])
    assert findings["columns"].startswith("completions_00002.parquet: ")


@pytest.mark.parametrize(
    "ends", [[[9e18], [0], [0], [0]], [[-3], [0], [0], [0]], [["x"], ["0"], ["0"], ["0"]], [[0, 1], [0], [0], [0]]]
)
def test_step_ends_out_of_range_are_named_with_their_file(log, ends):
    write_rewards(log, 2, REWARDS, step_rewards=[[1.0]] * 4, step_ends=ends)
    steps, findings = read(log)
    assert steps == [1, 3]
    assert findings["columns"].startswith("completions_00002.parquet: ")
    assert "step_ends" in findings["columns"]


def test_numbers_beyond_float32_cost_their_group_alone(log):
    write_rewards(log, 2, {"r": [1e39, 0.0, 0.5, 0.25]}, advantage=[0.5, -0.5, 0.125, -0.125])
    write_rewards(log, 4, REWARDS, advantage=[np.inf, -0.5, 0.125, -0.125])
    rollouts = Rollouts(log)
    result = replay(rollouts, ["dr_grpo"])
    assert {kind: f.count for kind, f in rollouts.findings.items()} == {"infinite rewards": 1, "infinite advantages": 1}
    assert result.same == ["dr_grpo"]


def test_a_log_without_a_single_judgment_is_named(tmp_path):
    write_rewards(tmp_path, 1, {"r": [np.nan] * 4}, advantage=[np.nan] * 4)
    with pytest.raises(ValueError, match="No completion of the log was judged: 'r' hold nothing but NaN, from step 1"):
        replay(Rollouts(tmp_path))


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.5, 0.0], [0.7] * 4], ids=["advantages are NaN", "rewards are equal"])
def test_a_log_whose_advantages_say_nothing_says_so(tmp_path, rewards):
    write_rewards(tmp_path / "run", 1, {"r": rewards}, advantage=[np.nan] * 4)
    write_replay(replay(Rollouts(tmp_path / "run"), ["grpo", "dr_grpo"]), tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "The log does not tell whose advantages the run trained on" in text
    assert "difference of nan" not in text


def test_a_table_of_many_steps_is_read_in_one_pass(tmp_path):
    steps = [step for step in range(3000) for _ in range(2)]
    write(tmp_path, 1, table({"r": [1.0, 0.0] * 3000}) | {"step": steps})
    assert read(tmp_path)[0] == list(range(3000))


def test_an_unwanted_column_may_be_there_twice(tmp_path):
    path = tmp_path / "completions_00001.parquet"
    names = ["prompt", "completion", "note", "note"]
    pq.write_table(pa.table([pa.array(["a"])] * 4, names=names), path)
    assert read_table(path, {"prompt", "completion"}).column_names == ["prompt", "completion"]
