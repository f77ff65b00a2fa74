import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from grpo_plus.compare import Rollouts, figures, replay, svg, write_replay
from grpo_plus.compare.files import write_files
from grpo_plus.compare.report import Figure, Heading, Quote, Section, Table, Text, to_html, to_markdown
from tests.compare.logs import write_rewards

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & \x00\x1b[31m \"quoted\" 'too'"
NAMES = ["grpo", "<b>&\"'", "$\\frac{1}{2}$", "package.with.a.very.long.dotted.path.to_a_function"]


def page(*blocks):
    return to_html("A title", "A lead", [Section("One", blocks)])


def hostile_log(run_dir):
    """Markup in completions, prompts, tasks and the reward's own name."""
    rewards = {"<i>$r$": [1.0, 0.0, 0.5, 0.0], "b": [0.0, 0.0, 0.25, 1.0]}
    texts = {"prompt": [HOSTILE] * 2 + ["other"] * 2, "completion": [HOSTILE] * 4, "task": [HOSTILE] * 2 + ["$x"] * 2}
    write_rewards(run_dir, 1, rewards, advantage=[0.5, -0.5, 0.1, -0.1], **texts)
    return Rollouts(run_dir)


def test_what_a_model_wrote_stays_text():
    html = page(
        Quote(HOSTILE, HOSTILE), Text(HOSTILE, (HOSTILE,)), Table(HOSTILE, (HOSTILE,), [(HOSTILE,)]), Heading(HOSTILE)
    )
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 8
    assert "\x00" not in html
    assert "\x1b" not in html


def test_the_page_needs_and_runs_nothing_from_elsewhere(tmp_path):
    [path, *_] = write_replay(replay(hostile_log(tmp_path / "run")), tmp_path / "out")
    html = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"(src|href|url\(|@import)\W{0,2}(https?:|//|file:|data:)", outside)
    assert "<script" not in html


def test_numbers_that_do_not_exist_are_a_dash():
    html = page(Table("t", ("name", "x"), [("a", float("nan")), ("b", None), ("c", 0.12345), ("d", 12345)]))
    assert re.findall(r'<td class="n">(.*?)</td>', html) == ["n/a", "n/a", "0.123", "12,345"]


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


def test_markdown_has_the_tables_and_no_text_of_the_model():
    table = Table("Shares", ("name", "x"), [("a|b", 0.5)])
    text = to_markdown(
        "T", "L", [Section("S", [Text("t", ("one", "two")), table, Figure("f", "<svg/>"), Quote("q", "secret")])]
    )
    assert "| name | x |\n| --- | --- |\n| a\\|b | 0.500 |" in text
    assert "t\n\n- one\n- two" in text
    assert "secret" not in text


@pytest.mark.parametrize("draw", [
    lambda: figures.heatmap(NAMES, np.array([[1, 0.5, np.nan, 0]] * 4), label="$x$", low=0, high=1),
    lambda: figures.bars(dict(zip(NAMES, [0.1, float("nan"), 0.0, 2.0], strict=True)), label="<x>"),
    lambda: figures.stacked({name: {HOSTILE: 0.5, "b": 0.25} for name in NAMES}, label="x"),
    lambda: figures.stacked({name: {f"task {k}": 0.05 for k in range(12)} for name in NAMES}, label="x"),
    lambda: figures.histograms({name: np.array([0.0, 1.0, -9.0]) for name in NAMES} | {"zeros": np.zeros(3)}),
    lambda: figures.side_by_side(NAMES, np.array([[0.0, 0.0], [1.0, -1.0], [1e9, 1.0], [-1e-9, 0.0]])),
    lambda: figures.side_by_side(NAMES, np.random.default_rng(0).normal(size=(4, 64))),
], ids=["heatmap", "bars", "stacked", "many parts", "histograms", "group", "large group"])  # fmt: skip
def test_figures_are_well_formed_and_take_the_pages_colours(draw):
    drawn = draw()
    root = ElementTree.fromstring(drawn)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root.get("viewBox").startswith("0 0 ")
    assert root.get("width") is None
    assert "var(--ink)" in drawn
    assert not set(svg.PAGE) & set(re.findall(r"#\w{6}", drawn))
    assert draw() == drawn


def test_shares_that_are_too_many_are_added_up():
    drawn = figures.stacked({"grpo": {f"task {k}": 1 / 12 for k in range(12)}}, label="x")
    assert "5 others" in drawn
    assert "task 6" in drawn
    assert "task 7" not in drawn


def test_a_failed_write_leaves_the_old_files(tmp_path):
    write_files(tmp_path, {"a": lambda p: p.write_text("old"), "b": lambda p: p.write_text("old")})

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path, {"a": lambda p: p.write_text("new"), "b": fail})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


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
