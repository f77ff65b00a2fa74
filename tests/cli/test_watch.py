"""A running training in the terminal, from files that are written while they are read."""

import io
import json
import time
import warnings

import pandas as pd
import pytest
from rich.console import Console
from transformers import TrainerState, TrainingArguments

from grpo_plus import RunLogCallback, cli
from grpo_plus.cli.figures import duration, figure, sparkline
from grpo_plus.cli.watch_frame import frame as drawn
from grpo_plus.report.run_log import LOG_FILE, append_line, read_log


def log(folder, rewards, *, start: int = 0, max_steps: int = 10, ago: float = 0.0, **figures) -> None:
    """Logs of a run that takes two seconds per step."""
    now = time.time() - ago
    append_line(folder, {"event": "begin", "step": start, "max_steps": max_steps, "time": now}, anew=start == 0)
    for number, reward in enumerate(rewards, start=1):
        when = now - 2 * (len(rewards) - number)
        line = {"event": "log", "step": start + number, "max_steps": max_steps, "time": when}
        append_line(folder, line | {"figures": {"reward": reward, **figures}})


def table(folder, step: int, completion: str) -> None:
    (folder / "completions").mkdir(exist_ok=True)
    rows = {"step": [step] * 2, "prompt": ["1+1=", "2+2="], "completion": [completion, "4"], "right": [0.0, 1.0]}
    pd.DataFrame(rows | {"advantage": [-1.0, 1.0]}).to_parquet(
        folder / "completions" / f"completions_{step:05}.parquet"
    )


def frame(folder, capsys, monkeypatch, width: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["watch", str(folder), "--once"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 200])
def test_a_frame_shows_how_far_the_run_is(tmp_path, capsys, monkeypatch, width):
    log(tmp_path, [0.1, 0.2, 0.4, 0.8], **{"rewards/right/mean": 0.5, "advantages/dead_groups": 0.25})
    table(tmp_path, 4, "\x1b[2Jfour")
    printed = frame(tmp_path, capsys, monkeypatch, width)
    assert "step 4 of 10" in printed
    assert "2.0 s per step, 12 s left" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert rows["reward"] == ["0.100", "0.800", "▁▂▄█"]
    assert rows["right"] == ["0.500", "0.500", "────"]
    assert rows["dead"] == ["groups", "0.250", "0.250", "────"]
    assert "right 0" in printed
    assert "\x1b[2J" not in printed
    assert max(map(len, printed.splitlines())) <= width


@pytest.mark.parametrize(("height", "shown"), [(16, 2), (12, 1), (8, 0)])
def test_a_frame_has_as_many_completions_as_the_terminal_has_room_for(tmp_path, height, shown):
    log(tmp_path, [0.1, 0.2])
    table(tmp_path, 2, "a long\n\ncompletion " * 50)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(drawn(tmp_path, read_log(tmp_path), width=80, height=height, now=time.time()))
    lines = console.export_text().splitlines()
    assert len(lines) <= height
    assert sum(line.endswith(("right 0", "right 1")) for line in map(str.rstrip, lines)) == shown
    assert any("…" in line for line in lines[1:]) == (shown > 0)


def test_a_run_that_has_fallen_silent_has_no_time_left(tmp_path, capsys, monkeypatch):
    log(tmp_path, [0.1, 0.2], ago=1200)
    printed = frame(tmp_path, capsys, monkeypatch)
    assert "2.0 s per step, nothing logged for 20 min: it may have stopped" in printed
    assert " left" not in printed


def test_a_long_folder_leaves_the_first_line_whole(tmp_path, capsys, monkeypatch):
    folder = tmp_path / ("long-" * 30) / "run-of-today"
    log(folder, [0.1, 0.2, 0.4, 0.8])
    first = frame(folder, capsys, monkeypatch).splitlines()[0]
    assert first.startswith("…")
    assert "run-of-today  step 4 of 10" in first


def test_files_that_are_being_written_do_no_harm(tmp_path, capsys, monkeypatch):
    log(tmp_path, [0.5, 0.6])
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"event": "log", "step": 3, "figu')
    table(tmp_path, 2, "whole")
    (tmp_path / "completions" / "completions_00003.parquet").write_bytes(b"PAR1")
    printed = frame(tmp_path, capsys, monkeypatch)
    assert "step 2 of 10" in printed
    assert "whole" in printed


def test_a_resumed_run_stands_there_once(tmp_path):
    log(tmp_path, [0.1, 0.2, 0.3], ago=3600)
    log(tmp_path, [0.25], start=2)
    found = read_log(tmp_path)
    assert found.series("reward") == [(1, 0.1), (2, 0.2), (3, 0.25)]
    assert found.seconds_per_step < 4000  # over what follows the checkpoint alone
    log(tmp_path, [0.9])
    assert read_log(tmp_path).series("reward") == [(1, 0.9)]


def test_half_a_line_of_a_killed_process_does_not_swallow_the_next_one(tmp_path):
    append_line(tmp_path, {"event": "begin", "step": 0, "max_steps": 10})
    append_line(tmp_path, {"event": "log", "step": 5, "figures": {"reward": 0.5}})
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"event": "log", "st')
    append_line(tmp_path, {"event": "begin", "step": 4, "max_steps": 10})
    assert (read_log(tmp_path).since, read_log(tmp_path).entries) == (4, ())


def test_a_run_of_trls_is_read_from_its_newest_checkpoint(tmp_path, capsys, monkeypatch):
    assert "No log yet" in frame(tmp_path / "later", capsys, monkeypatch)
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"max_steps": 20, "log_history": [{"step": step, "reward": step / 10, "kl": None}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    printed = frame(tmp_path, capsys, monkeypatch)
    assert "step 10 of 20" in printed
    assert "unknown per step" in printed


def test_it_ends_with_the_run_or_by_ctrl_c(tmp_path, monkeypatch, capsys):
    looks = []

    def interrupt(seconds: float) -> None:
        looks.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    log(tmp_path, [0.5])
    assert cli.main(["watch", str(tmp_path), "--every", "3"]) == 0
    append_line(tmp_path, {"event": "end", "step": 10, "max_steps": 10, "time": 0})
    assert cli.main(["watch", str(tmp_path)]) == 0
    assert looks == [3.0]
    for every in ("0", "nan", "inf"):
        assert cli.main(["watch", str(tmp_path), "--every", every]) == 1


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "out").write_text("a file")
    callback, state = RunLogCallback(), TrainerState(max_steps=3, is_world_process_zero=True)
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.warns(UserWarning, match="cannot be written for `grpo-plus watch`"):
        callback.on_train_begin(args, state, None)
    with warnings.catch_warnings(action="error"):
        callback.on_log(args, state, None, logs={"reward": 1.0})


def test_numbers_and_times_are_short():
    assert sparkline([0, 1, 2, 3], 2) == "▁█"
    assert sparkline([float("nan")], 9) == ""
    assert [figure(value) for value in (0.0, 0.5, 1234.5, 2.5e-4, 12.0)] == ["0", "0.500", "1,234", "2.50e-04", "12"]
    assert [duration(value) for value in (1.25, 42, 600, 7500)] == ["1.2 s", "42 s", "10 min", "2 h 05 min"]


def test_a_length_that_a_reward_function_logs_is_no_reward(tmp_path, capsys, monkeypatch):
    log(tmp_path, [0.1, 0.2])
    (tmp_path / "completions").mkdir()
    rows = {"step": [2], "prompt": ["1+1="], "completion": ["2"], "right": [1.0], "completion_length": [3.5]}
    pd.DataFrame(rows).to_parquet(tmp_path / "completions" / "completions_00002.parquet")
    printed = frame(tmp_path, capsys, monkeypatch)
    assert "right 1" in printed
    assert "3.5" not in printed


def test_a_prompt_with_a_picture_shows_its_text_and_the_place_of_the_picture(tmp_path, capsys, monkeypatch):
    log(tmp_path, [0.1, 0.2])
    (tmp_path / "completions").mkdir()
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]
    rows = {"step": [2], "prompt": [[{"role": "user", "content": asked}]], "right": [1.0]}
    rows["completion"] = [[{"role": "assistant", "content": "3"}]]
    pd.DataFrame(rows).to_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert "[image] How many?" in frame(tmp_path, capsys, monkeypatch)
