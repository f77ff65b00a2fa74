import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from grpo_plus.compare.comparison import ArmResult, Comparison, StartSignal
from grpo_plus.compare.plan import Variant, planned_arms
from grpo_plus.compare.report import write_comparison
from grpo_plus.compare.report_scores import METHOD, completions
from grpo_plus.compare.rows import curve
from grpo_plus.compare.samples import LONGEST, Sample, for_file
from grpo_plus.compare.store import SAMPLES, write_json
from grpo_plus.compare.verdict import ScoreVerdict
from grpo_plus.report.page import Section, to_html

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \x00 <i>$r$"
VERSIONS = {"grpo_plus": "1", "trl": "2"}


def comparison_of(folder, scores, *, failures=None, variants=None, steps=12):
    """A finished comparison with these held-out scores: by label, one list of items per seed; None: no result."""
    variants = variants or [Variant("grpo", label=label) for label in scores]
    seeds = range(len(next(iter(scores.values()))))
    arms = planned_arms(variants, list(seeds))
    results = {}
    for arm in arms:
        items = scores[arm.variant.label][arm.seed]
        if items is None:
            continue
        held_out = {"accuracy": items, "style": [0.5] * len(items)}
        results[arm] = ArmResult(held_out, 2.0 + arm.seed, 1.0, 1000.0, 5_000_000, steps, VERSIONS)
        target = folder / "arms" / arm.folder
        target.mkdir(parents=True)
        log = [
            {"step": s, "reward": s + arm.seed, "rewards/a/mean": s, "rewards/b/mean": None if s % 2 else 1.0}
            for s in range(1, steps + 1)
        ]
        (target / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*log, {"train_loss": 1}]))
    labels = [variant.label for variant in variants]
    signal = StartSignal(
        advantages={label: [1.0, -1.0, 0.5, -0.5] for label in labels},
        snr={label: 0.1 * k for k, label in enumerate(labels)},
        cosine={a: {b: 1.0000001 if a == b else 0.5 for b in labels} for a in labels},
        groups=2,
    )
    shared = {"task": "a task", "facts": {"rows": 3}, "config": {"beta": 0.0}}
    start = {"accuracy": [0.0, 1.0], "style": [0.5, 0.5]}
    return Comparison(folder, shared, arms, start, signal, results, failures or {})


def noisy(mean, seeds, items=40):
    generator = torch.Generator().manual_seed(round(1000 * mean))
    return (mean + 0.01 * torch.randn(seeds, items, generator=generator)).tolist()


def hostile_comparison(folder):
    """More variants than colours, long names, markup wherever a user or a model could put it, and a failure."""
    labels = [HOSTILE, "package.with.a.very.long.dotted.path.to_a_function", *(f"v{k}" for k in range(8))]
    variants = [Variant("grpo", label=label) for label in labels]
    scores = {label: noisy(0.1 * k, 3) for k, label in enumerate(labels)}
    scores["v7"][1] = None
    comparison = comparison_of(folder, scores, variants=variants)
    failed = next(arm for arm in comparison.arms if arm.variant.label == "v7" and arm.seed == 1)
    return replace(comparison, failures={failed: f"Traceback\n  line\nRuntimeError: {HOSTILE}"})


def test_items_that_nothing_judged_are_left_out_in_every_arm(tmp_path):
    nan = float("nan")
    comparison = comparison_of(tmp_path, {"a": [[1.0, nan, 0.0]], "b": [[0.0, 1.0, 1.0]]})
    assert comparison.scores("accuracy")["b"].tolist() == [[0.0, 1.0]]
    write_comparison(comparison, tmp_path)
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "1 of 3 items, which some arm has no score for, are left out in all" in summary
    assert summary.count("left out in all") == 1
    with pytest.raises(ValueError, match="judged on 1 and 2 items of 'accuracy'"):
        comparison_of(tmp_path / "b", {"a": [[1.0, 0.0]], "b": [[0.0]]}).scores("accuracy")


def test_a_score_that_no_item_has_in_every_arm_is_said_to_be_missing(tmp_path):
    nan = float("nan")
    comparison = comparison_of(tmp_path, {"a": [[nan, nan]] * 3, "b": [[0.0, 1.0]] * 3})
    summary = write_comparison(comparison, tmp_path)[1].read_text(encoding="utf-8")
    assert "**No held-out item has a `accuracy` in every arm.**" in summary
    assert "nothing was judged" in summary


def test_the_answer_comes_first_with_the_start_and_the_command_of_the_next_step(tmp_path):
    scores = {label: noisy(mean, 4) for label, mean in {"a": 0.25, "b": 0.85, "c": 0.55, "d": 0.45}.items()}
    comparison = comparison_of(tmp_path, scores, steps=1)
    steps = []
    page, summary, *_ = write_comparison(comparison, tmp_path, command=lambda step: steps.append(step) or "type this")
    html, text = page.read_text(encoding="utf-8"), summary.read_text(encoding="utf-8")
    assert [step.winner for step in steps] == ["b"]
    assert html.index('class="answer settled"') < html.index("<figure>") < html.index(METHOD[:40])
    assert re.findall(r"<dt>(?:<code>)?([\w ]+).*?<dd>(\d\.\d)", html) == [
        ("before training", "0.5"),
        ("b", "0.8"),
        ("c", "0.5"),
        ("d", "0.4"),
    ]
    assert "<code>type this</code>" in html
    assert "\n    type this\n" in text


def test_equal_completions_are_shown_once_under_the_names_of_all_who_wrote_them(tmp_path):
    comparison = comparison_of(tmp_path, {"a": noisy(0.2, 3), "b": noisy(0.2, 3), "c": noisy(0.3, 3)})
    assert completions(comparison) == []
    answers = {"start": "?", "arms/a-seed0": "four", "arms/b-seed0": f"five {HOSTILE}", "arms/c-seed0": "four"}
    for folder, answer in answers.items():
        samples = [Sample("2 + 2", answer), Sample("long", "x" * 9000), Sample("token", "hf_" + "a" * 20)]
        write_json(tmp_path / folder, {SAMPLES: for_file([*samples, Sample("one too many", "")])})
    html = to_html("", "", [Section("", completions(comparison))])
    titles = re.findall(r"<h4>(.*?)</h4><pre", html[html.index('class="beside"') :])
    assert titles[:3] == [
        "<code>before training</code>",
        "<code>a</code>, <code>c</code>",
        "<code>b</code>",
    ]
    assert "<script" not in html
    assert "<summary>Prompt 2</summary>" in html
    assert "x" * LONGEST + " […]" in html
    assert "x" * (LONGEST + 1) not in html
    assert "hf_" not in html
    assert "one too many" not in html


def test_a_curve_is_the_smoothed_mean_over_the_steps_that_all_arms_logged():
    logs = [
        [{"step": s, "r": float(s)} for s in (1, 2, 3, 4)],
        [{"step": s, "r": 3.0 * s} for s in (2, 3, 4)] + [{"step": 5, "r": None}],
    ]
    found = curve(logs, "r", 2)
    # means at 2, 3, 4: 4, 6, 8; over two steps: 5, 7
    assert found.steps == [3.0, 4.0]
    assert found.values == [5.0, 7.0]
    assert curve(logs, "absent", 1) is None


def test_the_files_hold_the_same_numbers(tmp_path):
    comparison = comparison_of(tmp_path, {"a": noisy(0.2, 3), "b": noisy(0.7, 3)})
    paths = write_comparison(comparison, tmp_path / "Bericht 結果")
    assert [path.name for path in paths] == ["report.html", "summary.md", "results.csv", "results.parquet"]
    parquet = pd.read_parquet(paths[3])
    assert len(pd.read_csv(paths[2])) == len(parquet)
    [difference] = ScoreVerdict(comparison, "accuracy").differences
    stored = parquet[(parquet["name"] == "accuracy") & parquet["statistic"].str.startswith("difference")].set_index(
        "statistic"
    )
    assert stored["value"].to_dict() == {
        "difference": pytest.approx(difference.interval.estimate),
        "difference_low": pytest.approx(difference.interval.low),
        "difference_high": pytest.approx(difference.interval.high),
    }
    logged = parquet[(parquet["statistic"] == "log") & (parquet["name"] == "reward") & (parquet["variant"] == "b")]
    assert logged[logged["step"] == 12]["value"].tolist() == [12.0, 13.0, 14.0]
    assert parquet[(parquet["statistic"] == "cost") & (parquet["name"] == "seconds")]["value"].tolist() == [
        2.0,
        2.0,
        3.0,
        3.0,
        4.0,
        4.0,
    ]
    summary = paths[1].read_text(encoding="utf-8")
    assert f"| b - a | {-difference.interval.estimate:+.3f}" in summary


def test_markup_in_names_and_tracebacks_stays_text(tmp_path):
    html = write_comparison(hostile_comparison(tmp_path), tmp_path)[0].read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)") > 5


def test_nothing_finished_is_a_report_too(tmp_path):
    comparison = comparison_of(tmp_path, {"a": [None], "b": [None]})
    comparison = replace(comparison, failures=dict.fromkeys(comparison.arms, "ValueError: no\n"))
    page = write_comparison(comparison, tmp_path)[0].read_text(encoding="utf-8")
    assert "No arm is finished on a seed that all variants share." in page
    assert "2 arms failed: <code>a, seed 0</code>, <code>b, seed 0</code>" in page
