import re

import numpy as np
import pandas as pd
import pytest

from grpo_plus.replay import Rollouts, replay, write_replay
from grpo_plus.replay.report import document
from grpo_plus.report.page import Answer, Fold, Table
from tests.replay.logs import hostile_log, write_rewards
from tests.replay.test_advice import write_apart


def test_the_page_needs_and_runs_nothing_from_elsewhere(tmp_path):
    [path, *_] = write_replay(replay(hostile_log(tmp_path / "run")), tmp_path / "out")
    html = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"(src|href|url\(|@import)\W{0,2}(https?:|//|file:|data:)", outside)
    assert "<script" not in html


def test_every_section_is_reached_from_the_navigation(tmp_path):
    [path, *_] = write_replay(replay(hostile_log(tmp_path / "run"), ["grpo", "gdpo"]), tmp_path / "out")
    html = path.read_text(encoding="utf-8")
    targets = re.findall(r'<li><a href="#(.*?)">', html)
    assert len(targets) == html.count("<h2")
    assert [target for target in targets if f'<h2 id="{target}">' not in html] == []
    ids = re.findall(r'\sid="(.*?)"', html)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#(.*?)\)", html)) | set(re.findall(r'href="#(.*?)"', html))
    assert used <= set(ids)


def test_the_files_hold_the_same_numbers(tmp_path):
    folder = tmp_path / "Bericht mit Leerzeichen 結果"
    result = replay(hostile_log(tmp_path / "run"), ["grpo", "dr_grpo"])
    paths = write_replay(result, folder)
    assert [path.name for path in paths] == ["report.html", "summary.md", "results.csv", "results.parquet"]
    csv, parquet = pd.read_csv(folder / "results.csv"), pd.read_parquet(folder / "results.parquet")
    assert len(csv) == len(parquet) == len(result.rows())
    np.testing.assert_allclose(csv["value"], parquet["value"])
    assert set(parquet["estimator"]) == {"grpo", "dr_grpo", "logged", ""}


def test_the_summary_names_what_is_wrong_with_the_log(tmp_path):
    hostile_log(tmp_path)
    path = write_rewards(tmp_path, 2, {"b": [1.0, 0.0]})
    write_rewards(tmp_path, 3, {"b": [1.0, 0.0]}).write_bytes(path.read_bytes()[:99])
    write_replay(replay(Rollouts(tmp_path), ["grpo", "dr_grpo", "passk"]), tmp_path)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "completions_00002.parquet lacks <i>$r$" in text
    assert "completions_00003.parquet is not a whole parquet file" in text
    assert "| passk | passk needs a reward of 0 or 1" in text
    assert "No estimator gives the advantages that the run trained on" in text


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    names = ["dr_grpo", "rloo", "gdpo", "grpo", "rank", "popart", "ngrpo", "maxrl", "spo"]
    result = replay(Rollouts(write_apart(tmp_path_factory.mktemp("apart"))), names)
    return result, document(result)[2]


def test_the_report_begins_with_the_advice_and_the_command(apart):
    result, sections = apart
    answer = sections[0].blocks[0]
    assert isinstance(answer, Answer)
    assert answer.verdict == "Compare `grpo` with `gdpo` and `mo_grpo`."
    assert answer.command == result.next_command


def test_estimators_with_one_update_share_a_row_and_six_rows_are_open(apart):
    result, sections = apart
    _, first, rest = sections[1].blocks
    assert isinstance(first, Table)
    assert isinstance(rest, Fold)
    everything = rest.blocks[0]
    labels = [row[0] for row in everything.rows]
    assert labels == ["grpo = logged", "dr_grpo = rloo x 0.833", "gdpo", "rank", "popart", "ngrpo", "maxrl"]
    # The run's own first, then what to compare with it, then what ranks least like it.
    assert [row[:2] for row in first.rows[:2]] == [("grpo = logged", "the run's own"), ("gdpo", "compare")]
    assert len(first.rows) == 6
    assert {row[0] for row in first.rows} < set(labels)
    sizes = {row["estimator"] for row in result.rows() if row["statistic"] == "mean_abs"}
    assert sizes == {*result.recipes, "logged"} - {"spo"}


def test_without_a_reason_the_report_has_no_command(tmp_path):
    answer = document(replay(hostile_log(tmp_path), ["grpo", "dr_grpo"]))[2][0].blocks[0]
    assert (answer.command, answer.action, answer.settled) == ("", "", False)
    assert answer.verdict.startswith("Stay with `")
