import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from grpo_plus.compare.comparison import ArmResult, Comparison, StartSignal
from grpo_plus.compare.plan import Variant, planned_arms
from grpo_plus.compare.report import write_comparison
from grpo_plus.compare.rows import curve
from grpo_plus.compare.verdict import ScoreVerdict, in_short

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


def test_a_difference_is_claimed_where_the_interval_leaves_out_zero(tmp_path):
    comparison = comparison_of(tmp_path, {"low": noisy(0.3, 4), "high": noisy(0.8, 4), "same": noisy(0.3, 4)})
    first, *claims = in_short(comparison)
    assert first.startswith("Mean held-out `accuracy` over 4 seeds: `high` 0.80")
    assert first.endswith("Before training it was 0.500.")
    assert sorted(claim.partition(",")[0] for claim in claims[:2]) == [
        "`high` scores above `low` in `accuracy`",
        "`high` scores above `same` in `accuracy`",
    ]
    assert claims[2].startswith("For the other 1 of 3 comparisons the interval includes 0")
    assert len(claims) == 3


def test_no_difference_is_claimed_where_none_is_shown(tmp_path):
    comparison = comparison_of(
        tmp_path, {"a": [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], "b": [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]}
    )
    ranking, verdict = in_short(comparison)
    assert "`b` 0.667" in ranking
    assert verdict.startswith("No difference in `accuracy` is shown: 1 comparison, and every 95% interval includes 0.")
    assert "does not show that there is none" in verdict
    assert "scores above" not in verdict


def test_arms_that_score_alike_on_every_item_bound_no_difference(tmp_path):
    same = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    verdict = in_short(comparison_of(tmp_path, {"a": same, "b": same}))[1]
    assert "every arm of a seed has the same score on every held-out item" in verdict
    assert "differences of up to" not in verdict


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_claim_nothing_however_large_the_gap(tmp_path, seeds):
    lines = in_short(comparison_of(tmp_path, {"a": [[0.0] * 9] * seeds, "b": [[1.0] * 9] * seeds}))
    assert "too few for intervals over runs, so no difference is claimed." in lines[1]
    assert [line for line in lines if "scores above" in line] == []


def test_a_seed_that_one_variant_lacks_is_left_out_of_all(tmp_path):
    scores = {"a": noisy(0.2, 4), "b": [*noisy(0.6, 3), None], "c": [None] * 4}
    comparison = comparison_of(tmp_path, scores)
    assert comparison.paired_seeds == [0, 1, 2]
    assert {label: values.shape for label, values in comparison.scores("accuracy").items()} == {
        "a": (3, 40),
        "b": (3, 40),
    }
    lines = in_short(comparison)
    assert "Left out, for not every variant has finished on it: seed 3." in lines
    assert "`c` has not finished on any seed and is not compared." in lines


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
    assert in_short(comparison)[1] == "No held-out item has a `accuracy` in every arm, so no difference is claimed."
    page, summary, *_ = write_comparison(comparison, tmp_path)
    assert "nothing was judged" in summary.read_text(encoding="utf-8")
    assert "differences of up to" not in page.read_text(encoding="utf-8")


def test_a_baseline_is_compared_with_each_other_and_a_wrong_one_is_refused(tmp_path):
    comparison = comparison_of(tmp_path, {"a": noisy(0.2, 3), "b": noisy(0.3, 3), "c": noisy(0.4, 3)})
    assert [(d.first, d.second) for d in ScoreVerdict(comparison, "accuracy", "b").differences] == [
        ("a", "b"),
        ("c", "b"),
    ]
    with pytest.raises(ValueError, match="There is no variant 'd'"):
        in_short(comparison, baseline="d")


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
    assert (
        f"| b - a | {-difference.interval.estimate:+.3f}" in summary
        or f"| a - b | {difference.interval.estimate:+.3f}" in summary
    )


def test_markup_in_names_and_tracebacks_stays_text(tmp_path):
    html = write_comparison(hostile_comparison(tmp_path), tmp_path)[0].read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)") > 5


def test_nothing_finished_is_a_report_too(tmp_path):
    comparison = comparison_of(tmp_path, {"a": [None], "b": [None]})
    comparison = replace(comparison, failures=dict.fromkeys(comparison.arms, "ValueError: no\n"))
    page = write_comparison(comparison, tmp_path)[0].read_text(encoding="utf-8")
    assert "there is nothing to compare" in page
    assert "2 arms failed: <code>a, seed 0</code>, <code>b, seed 0</code>" in page
