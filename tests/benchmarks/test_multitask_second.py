import json

import pytest

from benchmarks import multitask_second as second
from tests.benchmarks.test_multitask_results import arm

RIGHT = {"grpo": "c0", "dr_grpo": "80", "gdpo": "e0", "shrinkage": "f0", "gd2po": "00"}  # 2, 1, 3, 4 and 0 of 8


def write_rounds(folder):
    (folder / "second").mkdir()
    first, new = (
        [arm(name, seed, RIGHT[name]) for name in names for seed in range(3)]
        for names in (("grpo", "dr_grpo", "gdpo"), second.CHANGED)
    )
    for path, arms in ((folder / "two.json", first), (folder / "second" / "two.json", new)):
        path.write_text(json.dumps({"arms": arms}))


def test_the_second_round_leaves_out_a_twin_and_takes_the_tuned_rates():
    assert [one.estimator for one in second.variants("six")] == ["shrinkage", "gd2po"]
    assert [one.estimator for one in second.variants("one")] == ["shrinkage"]
    assert second.variants("six")[1].fields == {"learning_rate": second.LEARNING_RATE}


def test_the_rates_are_the_best_of_those_that_were_tried():
    tried = json.loads((second.SECOND / "tuning.json").read_text())
    for name in second.CHANGED:
        sums: dict[float, float] = {}
        for one in tried:
            if one["estimator"] == name:
                sums[one["learning_rate"]] = sums.get(one["learning_rate"], 0) + one["accuracy"]
        assert second.LEARNING_RATES.get(name, second.LEARNING_RATE) == max(sums, key=sums.__getitem__)


def test_an_arm_that_does_not_repeat_the_first_round_is_refused(tmp_path):
    write_rounds(tmp_path)
    second.check_repeats("two", [arm("grpo", 0, "c0")], tmp_path)
    with pytest.raises(RuntimeError, match="grpo, seed 0 does not repeat the first round in 'two'"):
        second.check_repeats("two", [arm("grpo", 0, "c1")], tmp_path)


def test_the_summary_compares_with_grpo_and_with_what_was_changed(tmp_path):
    write_rounds(tmp_path)
    text = second.write_summary(tmp_path)
    assert text == (tmp_path / "second" / "summary.md").read_text()
    rows = [line.split(" |")[:2] for line in text.splitlines() if line.startswith("| `")]
    assert [name for name, _ in rows] == [
        "| `shrinkage`",
        "| `gd2po`",
        "| `shrinkage` minus `grpo`",
        "| `shrinkage` minus `dr_grpo`",
        "| `gd2po` minus `grpo`",
        "| `gd2po` minus `gdpo`",
    ]
    estimates = [float(cell.split("[")[0]) for _, cell in rows]
    assert estimates == [0.5, 0.0, 0.25, 0.375, -0.25, -0.375]
