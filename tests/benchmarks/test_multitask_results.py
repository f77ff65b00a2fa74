import json

import pytest

from benchmarks.multitask_results import arm_of, by_estimator, paired, verdict, write_summary
from grpo_plus.compare.comparison import ArmResult
from grpo_plus.compare.intervals import Interval
from grpo_plus.compare.plan import Arm, Variant

SCORES = {"curve": 0.25, "worst_task": 0.125, "reward": 1.5, "accuracy/max": 0.75, "reward/form": 0.5, "share/max": 1.0}


def arm(estimator, seed, right, items=8):
    return {"estimator": estimator, "seed": seed, "right": right, "items": items, "cpu_seconds": 9.0, "scores": SCORES}


def test_the_bits_are_the_prompts_answered_right_and_seeds_are_paired():
    arms = [arm("grpo", 1, "0f"), arm("grpo", 0, "81"), arm("rloo", 0, "7"), arm("grpo", 2, "ff"), arm("rloo", 1, "0")]
    right = by_estimator(paired(arms), "accuracy")
    assert right["grpo"].tolist() == [[1, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]]  # seeds 0 and 1
    assert right["rloo"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0] * 8]


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0.01, 0.2, "More accurate than `grpo`: `rloo`; less accurate: none; undecided: none."),
    (-0.2, -0.01, "More accurate than `grpo`: none; less accurate: `rloo`; undecided: none."),
    (-0.01, 0.2, "More accurate than `grpo`: none; less accurate: none; undecided: `rloo`."),
    (float("nan"), float("nan"), "More accurate than `grpo`: none; less accurate: none; undecided: `rloo`."),
])  # fmt: skip
def test_the_verdict_says_no_more_than_the_interval(low, high, expected):
    assert verdict({"rloo": Interval((low + high) / 2, low, high)}) == expected


def test_the_summary_names_what_was_measured(tmp_path):
    bits = {"grpo": ["c0", "c1", "c0", "e0"], "rloo": ["fc", "fd", "fc", "fe"]}
    data = {
        "facts": {"weights": {"correct": 1.0, "form": 0.5}},
        "config": {"max_steps": 80},
        "start": {"accuracy": 0.25},
        "machine": {"processor": "a processor", "load": "idle"},
        "arms": [arm(name, seed, 8 * right, 64) for name, seeds in bits.items() for seed, right in enumerate(seeds)],
    }
    (tmp_path / "two.json").write_text(json.dumps(data))
    text = write_summary(tmp_path)
    assert text == (tmp_path / "summary.md").read_text()
    assert "## two: 1 correct, 0.5 form" in text
    assert "4 seeds, 64 held-out prompts, 80 steps, accuracy before: 0.250; 9.0 seconds of a core" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    # Right: 2 + 3 + 2 + 3 of each 32 against 6 + 7 + 6 + 7, one half more on every seed.
    assert rows[0].startswith("| `grpo` | 0.312 [")
    assert rows[0].endswith("| 0.250 [0.250, 0.250] | 0.125 [0.125, 0.125] | 1.500 [1.500, 1.500] |")
    assert rows[1].startswith("| `rloo` | 0.812 [")
    assert rows[2].startswith("| `rloo` | +0.500 [+0.")
    assert rows[3:] == [f"| `{name}` | {mean} |" for mean in ("0.750", "1.000", "0.500") for name in bits]
    assert "More accurate than `grpo`: `rloo`; less accurate: none; undecided: none." in text


def test_an_arm_keeps_its_worst_task_its_curve_and_the_prompts_it_answers_right():
    scores = {"accuracy": [0.0, 1.0, 1.0, 0.0], "accuracy/max": [0.0, 1.0], "accuracy/sort": [1.0, 1.0, 0.0]}
    log = [{"step": 1, "held_out_accuracy": 0.25}, {"step": 2, "held_out_accuracy": 0.5}]
    kept = arm_of(Arm(Variant("grpo"), 3), ArmResult(scores, 2.0, 1.0, None, None, 2, {}), log)
    assert kept["scores"]["worst_task"] == 0.5
    assert kept["scores"]["curve"] == 0.375
    assert (kept["right"], kept["items"]) == ("6", 4)
