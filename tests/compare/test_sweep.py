import functools
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from grpo_plus.cli.compare import result_table
from grpo_plus.cli.next_command import NextCommand
from grpo_plus.compare.choices import LARGEST, SMALLEST, choose, wider, with_edges
from grpo_plus.compare.comparison import read_arm
from grpo_plus.compare.conclusion import NextStep, conclusion
from grpo_plus.compare.plan import Arm, Variant
from grpo_plus.compare.report import write_comparison
from grpo_plus.compare.sweep import Candidate, Sweep, candidates, check_items, halves, judging_half
from grpo_plus.compare.sweep_report import choice_lines, wider_flags
from grpo_plus.compare.train import compare
from grpo_plus.compare.verdict import caveats, first_verdict
from tests.compare.small import small_task
from tests.compare.test_train import count_trainings

RATES = [1e-5, 3e-5, 1e-4]
NAN = float("nan")


def candidates_of(sweep, *labels):
    """Every variant at every setting; none is a variant's own."""
    return candidates([Variant("grpo", label=label) for label in labels], sweep, lambda _: small_task().config())


def test_a_sweep_is_every_combination_of_whole_and_other_numbers():
    sweep = Sweep({"learning_rate": [1, 2], "num_generations": [4.0, 8]})
    assert sweep.settings == [
        {"learning_rate": 1.0, "num_generations": 4},
        {"learning_rate": 1.0, "num_generations": 8},
        {"learning_rate": 2.0, "num_generations": 4},
        {"learning_rate": 2.0, "num_generations": 8},
    ]
    assert [type(value) for value in sweep.settings[0].values()] == [float, int]


@pytest.mark.parametrize(("grid", "message"), [
    ({}, "names no field"),
    ({"lerning_rate": RATES}, "no such field. Did you mean 'learning_rate'"),
    ({"seed": [1, 2]}, "the comparison sets seed itself"),
    ({"lr_scheduler_type": [1, 2]}, "lr_scheduler_type is impossible: the field is not numeric"),
    ({"bf16": [0, 1]}, "bf16 is impossible: the field is not numeric"),
    ({"learning_rate": [1e-5]}, r"learning_rate=\[1e-05\] leaves nothing to choose"),
    ({"learning_rate": [1e-5, 0.00001]}, "learning_rate=1e-05 twice"),
    ({"learning_rate": [1e-5, "high"]}, "learning_rate='high', which is not a number"),
    ({"learning_rate": [1e-5, NAN]}, "learning_rate=nan, which is not a number"),
    ({"num_generations": [2, 2.5]}, "num_generations=2.5, which is not a whole number"),
], ids=["none", "unknown", "seed", "text", "boolean", "one", "twice", "word", "nan", "fraction"])  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused_by_field_and_value(grid, message):
    with pytest.raises(ValueError, match=message):
        Sweep(grid)


@pytest.mark.parametrize(("changes", "message"), [
    ({"sweep": {"num_generations": [4, 5]}}, r"(?s)5.*num_generations|num_generations.*5"),
    ({"sweep": {"learning_rate": RATES}, "sweep_seeds": [0]}, "Seed 0 would choose a setting and judge the same"),
    ({"sweep": {"learning_rate": RATES}, "sweep_seeds": []}, "at least 1 seed to choose"),
    ({"sweep": {"learning_rate": RATES}, "variants": [Variant("grpo", fields={"learning_rate": 1.0})]},
     "sets learning_rate itself, so a sweep cannot"),
], ids=["config", "shared", "no seeds", "own"])  # fmt: skip
def test_a_sweep_that_the_comparison_cannot_train_is_refused_before_any_work(tmp_path, changes, message):
    given = {"variants": ["grpo"], "seeds": [0]} | changes
    with pytest.raises(ValueError, match=message):
        compare(small_task(start=lambda: pytest.fail("work")), folder=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_halves_are_those_of_every_run_and_share_no_item():
    assert halves(7).choosing == [2, 3, 4]
    assert halves(7).judging == [0, 1, 5, 6]
    assert halves(1).judging == [0]
    assert judging_half({"a": [0.0, 1, 2, 3, 4, 5, 6]}) == {"a": [0, 1, 5, 6]}
    with pytest.raises(ValueError, match="'a' has 1 item"):
        check_items({"a": [1.0]})


def test_a_setting_in_the_title_is_the_label_of_a_variant_with_that_field():
    setting = {"learning_rate": 1e-5}
    swept = Variant("grpo", "dapo", {"beta": 0.1}, setting=setting)
    plain = Variant("grpo", "dapo", {"beta": 0.1, "learning_rate": 1e-5})
    assert swept.title == plain.label == "grpo + dapo (beta=0.1, learning_rate=1e-05)"
    assert swept.overrides == plain.overrides
    assert Arm(swept, 3).folder == Arm(plain, 3).folder
    assert Variant("grpo", label="mine", setting=setting).title == "mine (learning_rate=1e-05)"


def test_a_setting_that_is_the_tasks_own_is_the_plain_variant():
    config = functools.partial(small_task().config, output_dir="x")
    found = candidates([Variant("grpo")], Sweep({"learning_rate": [1e-2, 1e-3]}), lambda variant: config())
    assert [candidate.variant.title for candidate in found] == ["grpo", "grpo (learning_rate=0.001)"]
    assert [candidate.setting for candidate in found] == [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}]


def chosen(scores, *, values=(1.0, 2.0, 3.0), seeds=(7, 8)):
    """The choice among values of beta, for `a`. scores: by value, one list of items per seed; None: no result."""
    sweep = Sweep({"beta": values}, seeds)
    found = [Candidate("a", Variant("grpo", label="a", setting=setting), setting) for setting in sweep.settings]
    results = {
        Arm(candidate.variant, seed): items
        for candidate, of_one in zip(found, scores, strict=True)
        for seed, items in zip(seeds, of_one, strict=True)
        if items is not None
    }
    return choose(sweep, found, results, "accuracy")


def test_the_highest_mean_over_the_seeds_is_chosen():
    choices = chosen([[[0, 1], [0, 1]], [[1, 1], [1, 0]], [[1, 1], [0, 0]]])
    assert [trial.by_seed for trial in choices.trials] == [[0.5, 0.5], [1.0, 0.5], [1.0, 0.0]]
    assert [trial.mean for trial in choices.trials] == [0.5, 0.75, 0.5]
    assert choices.chosen["a"].setting == {"beta": 2.0}
    assert [trial.chosen for trial in choices.trials] == [False, True, False]


def test_of_equal_means_the_first_is_chosen():
    assert chosen([[[0, 0]] * 2, [[1, 0]] * 2, [[0, 1]] * 2]).chosen["a"].setting == {"beta": 2.0}


def test_a_setting_without_all_its_seeds_is_not_chosen():
    choices = chosen([[[0, 0]] * 2, [[1, 1], None], [[1, 0], [0, 0]]])
    assert choices.chosen["a"].setting == {"beta": 3.0}
    assert choices.trials[1].by_seed == []
    assert "Not eligible, because a training is missing or nothing was judged: `a` at beta=2.0." in choice_lines(
        choices
    )


def test_an_item_that_some_setting_has_no_score_for_chooses_nothing():
    choices = chosen([[[1, NAN], [0, 0]], [[0, 1], [0, 1]], [[0, 0], [0, 0]]])
    assert choices.chosen["a"].setting == {"beta": 1.0}  # on the first item alone
    assert chosen([[[NAN, 1]] * 2, [[1, NAN]] * 2, [[1, 1]] * 2]).chosen == {}
    assert chosen([[None] * 2] * 3).chosen == {}


def test_a_setting_that_nothing_judged_leaves_the_choice_to_the_others():
    choices = chosen([[[NAN, NAN], [1, 1]], [[0, 1], [1, 1]], [[0, 0], [0, 1]]])
    assert choices.chosen["a"].setting == {"beta": 2.0}
    assert choices.trials[0].by_seed == []


@pytest.mark.parametrize(("values", "side", "expected"), [
    (RATES, LARGEST, 3.3e-4),  # 1e-4 * 1e-4 / 3e-5
    (RATES, SMALLEST, 3.3e-6),
    ([8, 2, 4], LARGEST, 16),
    ([2, 3], SMALLEST, 1),
    ([1, 4], SMALLEST, 0),  # for the configuration to refuse
    ([0.0, 0.04], LARGEST, 0.08),
    ([0.0, 0.04], SMALLEST, None),
    ([100, 101], LARGEST, 102),
    ([1000.0, 1001.0], SMALLEST, None),  # rounds to the edge
    ([101.0, 102.0], LARGEST, None),  # 103 rounds to 100
])  # fmt: skip
def test_a_wider_sweep_goes_as_far_beyond_its_edge_as_the_edge_from_its_neighbor(values, side, expected):
    assert wider(values, side) == expected


def test_a_choice_at_the_edge_is_said_with_the_sweep_to_try_next():
    low, high = (chosen([[[score]] * 2 for score in scores]) for scores in ((1, 0, 0), (0, 0, 1)))
    edge = with_edges(high, lambda *_: True)
    assert choice_lines(edge)[1:] == [
        "The best beta of `a` is the largest that was tried, 3.0. Try larger values.",
        "The best may lie beyond the sweep. Repeat the command with `--sweep beta=1.0,2.0,3.0,4.5`.",
    ]
    assert wider_flags(with_edges(low, lambda *_: True)) == "--sweep beta=0.5,1.0,2.0,3.0"
    assert wider_flags(with_edges(high, lambda candidate, setting: setting["beta"] < 4)) == ""
    assert with_edges(chosen([[[score]] * 2 for score in (0, 1, 0)]), lambda *_: True).edges == []


class Examined:
    """Scores that the learning rate, the estimator and the seed decide: a training is known by what it was given.

    On the choosing seed and half, 1e-3 is best for grpo and 1e-2 for rloo; everywhere else it is the other way round.
    """

    def __init__(self, items=6):
        self.half = halves(items)
        self.items = items

    def __call__(self, trainer):
        config = trainer.args
        if not trainer.state.global_step:
            return {"right": [float(item in self.half.judging) for item in range(self.items)]}
        favored = (config.learning_rate == 1e-3) == (config.advantage_estimator == "grpo")
        chooses = [config.seed == 1000 and item in self.half.choosing for item in range(self.items)]
        return {"right": [float(favored == choosing) for choosing in chooses]}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two learning rates, one of them the task's own, and how it was trained."""
    task = small_task(evaluate=Examined())
    task = replace(task, config=functools.partial(task.config, max_steps=1))
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as monkeypatch:
        names = count_trainings(monkeypatch)
        arguments = {"sweep": {"learning_rate": [1e-3, 1e-2]}, "sweep_seeds": [1000]}
        comparison = compare(task, ["grpo", "rloo"], [0], folder, **arguments)
    return task, folder, arguments, comparison, names


def test_every_setting_is_trained_on_the_choosing_seeds_and_the_chosen_on_the_judging_seeds(swept):
    *_, comparison, names = swept
    assert names == [
        "grpo (learning_rate=0.001), seed 1000",
        "grpo, seed 1000",  # 0.01 is the task's own
        "rloo (learning_rate=0.001), seed 1000",
        "rloo, seed 1000",
        "grpo (learning_rate=0.001), seed 0",
        "rloo, seed 0",
    ]
    assert not comparison.failures
    settings = {label: candidate.setting for label, candidate in comparison.choices.chosen.items()}
    assert settings == {"grpo": {"learning_rate": 1e-3}, "rloo": {"learning_rate": 1e-2}}
    assert [trial.mean for trial in comparison.choices.trials] == [1.0, 0.0, 0.0, 1.0]


def test_only_other_seeds_and_items_judge_what_was_chosen(swept):
    *_, comparison, _ = swept
    scores = comparison.scores("right")
    assert {label: values.tolist() for label, values in scores.items()} == {"grpo": [[0.0] * 3], "rloo": [[0.0] * 3]}
    assert comparison.start == {"right": [1.0] * 3}
    assert comparison.seeds == [0]
    assert conclusion(first_verdict(comparison)).reasons[0] == "1 seed of each variant, judged on 3 held-out items."


def test_a_sweep_goes_on_where_it_was_and_shares_its_arms_with_other_comparisons(swept, monkeypatch, capsys):
    task, folder, arguments, comparison, _ = swept
    names = count_trainings(monkeypatch)
    loads_nothing = replace(task, start=lambda: pytest.fail("nothing is left to train"))
    again = compare(loads_nothing, ["grpo", "rloo"], [0], folder, **arguments, progress=True)
    assert again.results == comparison.results
    output = capsys.readouterr().out
    many = "2 variants x 2 settings x 1 seed to choose + 2 variants x 1 seed to judge = 6 trainings\n"
    assert output.startswith(f"{many}[1/6] grpo (learning_rate=0.001), seed 1000: right ")
    plain = compare(task, [Variant("grpo", fields={"learning_rate": 1e-3}), "rloo"], [0], folder)
    assert plain.choices is None
    assert [len(result.scores["right"]) for result in plain.results.values()] == [6, 6]
    assert names == []


def test_the_report_of_a_sweep_has_every_setting_its_score_and_its_half(swept):
    _, folder, _, comparison, _ = swept
    page, summary, _, parquet = write_comparison(comparison, folder / "report")
    text = summary.read_text(encoding="utf-8")
    assert (
        "Each variant is judged at its own best of 2 settings, chosen in other trainings: `grpo` at learning_rate=0.001; "
        "`rloo` at learning_rate=0.01." in text
    )
    assert "The best learning_rate of `grpo` is the smallest that was tried, 0.001. Try smaller values." in text
    assert "`--sweep learning_rate=0.0001,0.001,0.01,0.1`" in text
    assert "| grpo | 0.001 | 1.00 | chosen |" in text
    assert "| grpo | 0.01 | 0.00 |  |" in text
    assert "highest mean `right` there" in text
    assert "right by learning_rate, for grpo, rloo" in page.read_text(encoding="utf-8")
    rows = pd.read_parquet(parquet)
    held_out = rows[rows["statistic"] == "held_out"]
    found = [tuple(row) for row in held_out[["variant", "seed", "setting", "half", "value"]].itertuples(index=False)]
    assert found == [
        ("grpo", 0, "learning_rate=0.001", "judging", 0.0),
        ("rloo", 0, "learning_rate=0.01", "judging", 0.0),
        ("grpo", 1000, "learning_rate=0.001", "choosing", 1.0),
        ("grpo", 1000, "learning_rate=0.01", "choosing", 0.0),
        ("rloo", 1000, "learning_rate=0.001", "choosing", 0.0),
        ("rloo", 1000, "learning_rate=0.01", "choosing", 1.0),
    ]
    assert rows[rows["statistic"] == "chosen"]["setting"].tolist() == ["learning_rate=0.001", "learning_rate=0.01"]


def test_the_terminals_table_has_the_chosen_settings(swept, capsys):
    Console(width=80).print(result_table(first_verdict(swept[3])))
    grpo, rloo = (line for line in capsys.readouterr().out.splitlines() if "rate=" in line)
    assert "grpo" in grpo
    assert "learning_rate=0.001" in grpo
    assert "learning_rate=0.01 " in rloo


def test_the_next_command_trains_the_winner_at_its_setting_or_sweeps_on(swept):
    command = NextCommand({"sweep": ["learning_rate=0.001,0.01"], "sweep_seeds": 1}, [], swept[3].variants)
    assert command(NextStep("", winner="grpo")).endswith("--advantage_estimator grpo --learning_rate 0.001")
    assert command(NextStep("", variants=("grpo", "rloo"), seeds=5)) == (
        "grpo-plus compare --estimators grpo,rloo --seeds 5 --sweep learning_rate=0.001,0.01 --sweep_seeds 1"
    )


def test_a_variant_whose_every_setting_fails_is_not_judged_by_what_the_folder_holds(swept, tmp_path):
    task, folder, arguments, *_ = swept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for arm in ("rloo-seed1000", "rloo-learning_rate=0.001-seed1000"):
        (tmp_path / "arms" / arm / "result.json").unlink()

    def trainer(model, config):
        if "arms" in config.output_dir:
            raise RuntimeError("diverged")
        return task.trainer(model, config)

    comparison = compare(replace(task, trainer=trainer), ["grpo", "rloo"], [0], tmp_path, **arguments)
    assert [arm.name for arm in comparison.failures] == ["rloo (learning_rate=0.001), seed 1000", "rloo, seed 1000"]
    assert read_arm(tmp_path / "arms" / "rloo-seed0") is not None
    assert [variant.label for variant in comparison.finished] == ["grpo"]
    assert "`rloo` has not finished on any seed and is not compared." in caveats(comparison)
