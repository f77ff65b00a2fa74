from pathlib import Path

import pandas as pd
import pytest

from grpo_plus import cli
from tests.replay.logs import write_rewards

ESTIMATOR = """
def mine(rewards, *, factor=1.0):
    return factor * rewards.total()
"""


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "ein Lauf 日本"
    for step in (1, 2):
        rewards = {"a": [1.0, 0.0, 0.5, 0.0], "b": [0.0, 0.0, 0.25, 1.0]}
        write_rewards(folder, step, rewards, advantage=[0.5, -0.5, -0.125, 0.125])
    return folder


def test_it_writes_a_report_and_says_what_is_in_it(run_dir, capsys):
    assert cli.main(["replay", str(run_dir)]) == 0
    output = capsys.readouterr()
    folder = run_dir.parent / "grpo_plus_replay"
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.html",
        "results.csv",
        "results.parquet",
        "summary.md",
    ]
    lines = output.out.splitlines()
    assert lines[0] == "Stay with `dr_grpo`: a log of fewer than 30 groups gives no ground for a change."
    assert [line for line in lines[1:-1] if "are those of `dr_grpo`" in line]
    assert lines[-1].startswith(f"Report: {Path(folder.name, 'report.html')}")
    assert "2/2" in output.err  # the progress bar
    assert "ein Lauf 日本" in (folder / "report.html").read_text(encoding="utf-8")


def test_its_options(run_dir, monkeypatch):
    (run_dir.parent / "my_advantages.py").write_text(ESTIMATOR)
    arguments = ["--estimators", "dr_grpo, my_advantages.mine", "--num_generations", "2", "--rewards", "a"]
    arguments += ["--reward_weights", "2", "--advantage_kwargs", '{"my_advantages.mine": {"factor": 3}}']
    assert cli.main(["--debug", "replay", str(run_dir), *arguments, "--groups", "2:1", "--output_dir", "out"]) == 0
    results = pd.read_parquet(run_dir.parent / "out" / "results.parquet")
    sizes = results[results["statistic"] == "mean_abs"].set_index("estimator")["value"]
    # a twice: 2, 0, 1, 0. dr_grpo 1, 1, .5, .5; mine 6, 0, 3, 0
    assert sizes["dr_grpo"] == pytest.approx(0.75)
    assert sizes["my_advantages.mine"] == pytest.approx(2.25)
    assert "Step 2, group 1" in (run_dir.parent / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--estimators", "dr_grop"], "Did you mean 'dr_grpo'"),
    (["--groups", "first"], "--groups takes STEP:GROUP, such as 120:0, and not 'first'"),
    (["--advantage_kwargs", '{"passk": 4}'], "--advantage_kwargs takes a table by estimator"),
    (["--estimators", "grpo", "--advantage_kwargs", '{"passk": {"k": 2}}'], "'passk', which is not in use"),
    (["--num_generations", "3"], "4 of 4 completions are in no group of 3"),
], ids=["estimator", "group", "kwargs", "kwargs of another", "group size"])  # fmt: skip
def test_what_cannot_be_is_one_line_and_leaves_no_files(run_dir, capsys, arguments, message):
    assert cli.main(["replay", str(run_dir), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (run_dir.parent / "grpo_plus_replay").exists()


def test_a_folder_without_a_log_is_one_line(tmp_path, capsys):
    assert cli.main(["replay", str(tmp_path)]) == 1
    assert "log_completions=True" in capsys.readouterr().err


def test_the_flags_name_of_earlier_releases_still_works(run_dir):
    assert cli.main(["replay", str(run_dir), "--estimators", "grpo,dr_grpo", "--output", "old"]) == 0
    assert (run_dir.parent / "old" / "report.html").exists()


def test_what_a_terminal_would_obey_is_not_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "good\x1b[2J\u202edab\r"
    write_rewards(tmp_path / "run", 1, {name: [1.0, 0.0, 0.5, 0.0] * 16, "b": [0.05, 0.0, 0.05, 0.0] * 16})
    assert cli.main(["replay", "run", "--estimators", "grpo,dr_grpo"]) == 0
    assert cli.main(["replay", "run", "--rewards", "b", "--reward_weights", "1,2"]) == 1
    assert cli.main(["replay", "run", "--rewards", "x"]) == 1
    printed = capsys.readouterr()
    assert "good�[2J�dab" in printed.out
    assert "good�[2J�dab" in printed.err
    for sign in ("\x1b", "\u202e", "dab\r"):
        assert sign not in printed.out + printed.err
    page = (tmp_path / "grpo_plus_replay" / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in page + (tmp_path / "grpo_plus_replay" / "summary.md").read_text(encoding="utf-8")


def test_a_formula_is_text_in_the_table_for_spreadsheets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = "=cmd|'/C calc'!A0"
    write_rewards(tmp_path / "run", 1, {"r": [1.0, 0.0, 0.5, 0.0]}, task=[task, task, "a-b=c", "a-b=c"])
    assert cli.main(["replay", "run", "--estimators", "grpo,dr_grpo"]) == 0
    tasks = set(pd.read_csv(tmp_path / "grpo_plus_replay" / "results.csv", keep_default_na=False)["task"])
    assert tasks == {"", "'" + task, "a-b=c"}
    assert set(pd.read_parquet(tmp_path / "grpo_plus_replay" / "results.parquet")["task"]) == {"", task, "a-b=c"}
