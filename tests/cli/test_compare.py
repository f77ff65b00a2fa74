import json

import pandas as pd
import pytest

from grpo_plus import cli
from grpo_plus.cli import demo_task
from grpo_plus.compare.store import read_json
from tests.cli.test_train import CPU, NAMES

OWN = [*NAMES, *CPU, "--num_generations", "4", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
OWN += ["--max_completion_length", "8", "--num_held_out", "6", "--max_steps", "1"]


@pytest.fixture
def short_warm_up(monkeypatch):
    real = demo_task.warmed_up_model
    monkeypatch.setattr(demo_task, "warmed_up_model", lambda tokenizer, seed, steps: real(tokenizer, seed, 2))


def test_the_demos_task_is_compared_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, short_warm_up):
    monkeypatch.chdir(tmp_path)
    short = ["compare", "--max_steps", "1", "--num_held_out", "20", "--output_dir", "ein Vergleich 日本"]
    assert cli.main([*short, "--seeds", "1", "--estimators", "rloo, grpo"]) == 0
    output = capsys.readouterr().out
    folder = tmp_path / "ein Vergleich 日本"
    assert "[1/2] rloo, seed 0: accuracy 0." in output
    assert output.index("but 1 seed can show no difference.") < output.index("needs 3 seeds")
    again = "grpo-plus compare --estimators rloo,grpo --seeds 5 --max_steps 1 --num_held_out 20"
    assert f"Train 5 seeds. Intervals need 3.\n  {again} --output_dir 'ein Vergleich 日本'\n" in output
    assert str((folder / "report.html").relative_to(tmp_path)) in output
    assert {path.name for path in folder.iterdir()} > {"report.html", "summary.md", "results.csv", "results.parquet"}
    finished = (folder / "arms" / "rloo-seed0" / "result.json").stat().st_mtime_ns
    assert cli.main([*short, "--seeds", "2", "--estimators", "rloo"]) == 0
    output = capsys.readouterr().out
    assert "[1/2] rloo, seed 0: accuracy 0.000 (finished before)" in output
    assert (folder / "arms" / "rloo-seed0" / "result.json").stat().st_mtime_ns == finished
    results = pd.read_parquet(folder / "results.parquet")
    held_out = results[(results["statistic"] == "held_out") & (results["name"] == "accuracy")]
    assert held_out["seed"].tolist() == [0, 1]


def test_the_help_has_groups_and_says_where_trls_flags_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    output = capsys.readouterr().out
    titles = ["usage: grpo-plus compare", "what is compared:", "how it is judged:", "\nsweep:", "\noutput:"]
    places = [output.index(title) for title in titles]
    assert places == sorted(places)
    assert output.count("grpo-plus train --help") == 1
    assert [line for line in output.splitlines() if len(line) > 80] == []
    assert f"\n  {cli.compare.EXAMPLE}\n" in output


def test_a_users_own_model_data_and_rewards(workplace, capsys):
    """With adapters, two reward functions, two losses, and held-out rows from the end of the only split."""
    (workplace / "my_rewards.py").write_text(
        (workplace / "my_rewards.py").read_text()
        + "def even(completions, prompts, **_):\n    return [None if '1' in p else 1.0 for p in prompts]\n"
    )
    own = [*OWN[:6], "my_rewards.even", *OWN[6:], "--use_peft", "--lora_r", "4", "--beta", "0.1"]
    arguments = ["--estimators", "rloo,dr_grpo", "--losses", "dapo,cispo", "--seeds", "2", "--output_dir", "out"]
    assert cli.main(["--debug", "compare", *own, *arguments]) == 0
    output = capsys.readouterr().out
    assert "[8/8] dr_grpo + cispo, seed 1: reward" in output
    shared = read_json(workplace / "out" / "comparison.json")
    assert shared["facts"]["held-out rows"] == "the last 6 of 'train', which are not trained on"
    assert shared["facts"]["model"]["lora_r"] == 4
    assert shared["config"]["beta"] == 0.1
    scores = read_json(workplace / "out" / "arms" / "rloo-dapo-seed0" / "result.json")["scores"]
    assert set(scores) == {"reward", "vowels", "even"}
    assert sum(value != value for value in scores["even"]) == 6  # 10+1= to 15+1= all hold a 1
    assert [value for value in scores["reward"] if value != value] == []
    assert not list((workplace / "out").rglob("*.safetensors"))
    log = [json.loads(line) for line in (workplace / "out" / "arms" / "rloo-cispo-seed1" / "log.jsonl").open()]
    assert log[0]["kl"] >= 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["--estimators", "dr_grop"], "Did you mean 'dr_grpo'"),
    (["--losses", "cisp"], "Did you mean 'cispo'"),
    (["--seeds", "0"], "at least 1 seed"),
    (["--max_steps", "0"], "max_steps=0 trains nothing"),
    (["--estimators", ""], "at least one estimator"),
    (["--baseline", "rlo"], "There is no variant 'rlo' to compare with. Did you mean 'rloo'"),
    (["--advantage_kwargs", '{"passk": {"k": 2}}'], "'passk', which is not in use"),
    (["--dataset_name", "data"], "compare needs --model_name_or_path"),
    ([*NAMES[:4]], "compare needs --reward_funcs"),
    ([*OWN, "--num_held_out", "9"], "9 of the 16 rows of 'train' are too many to be held out"),
    ([*OWN, "--num_held_out", "-1"], "--num_held_out -1 judges no arm"),
    (["--num_held_out", "0"], "--num_held_out 0 judges no arm"),
    ([*OWN, "--dataset_streaming", "true"], "those of IterableDataset have none. Load the dataset without streaming"),
    ([*OWN, "--dataset_test_split", "tset"], "no split 'tset'"),
    (["--sweep", "lerning_rate=1,2"], "no such field. Did you mean 'learning_rate'"),
    (["--sweep", "learning_rate"], "--sweep learning_rate: write --sweep FIELD=VALUE,VALUE"),
    (["--sweep", "beta=1,2", "--sweep", "beta=3,4"], "--sweep beta=3,4: write --sweep FIELD=VALUE,VALUE, and every"),
    (["--sweep", "beta=0,much"], "A sweep has beta='much', which is not a number"),
    (["--sweep", "beta=0,1", "--sweep_seeds", "0"], "at least 1 seed to choose"),
    (["--sweep", "beta=0,1", "--sweep_seeds", "3", "--estimators", "grpo", "--seeds", "1001"],
     "Seed 1000 would choose a setting and judge the same setting. Let sweep_seeds=(1000, 1001, 1002)"),
    (["--sweep_seeds", "2"], "--sweep_seeds 2 chooses nothing without --sweep"),
    ([*OWN, "--lerning_rate", "1"], "Neither TRL nor grpo_plus takes --lerning_rate 1"),
], ids=["estimator", "loss", "seeds", "steps", "none", "baseline", "kwargs", "model", "rewards", "rows",
        "negative", "no rows", "streaming", "split", "swept field", "sweep", "swept twice", "swept word", "no seeds",
        "shared seed", "no sweep", "flag"])  # fmt: skip
def test_a_wrong_command_line_says_what_to_write_before_any_work(workplace, capsys, arguments, message):
    assert cli.main(["compare", "--output_dir", "out", *arguments]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert "warm-up" not in output.err
    assert not (workplace / "out").exists()


def test_held_out_batches_that_do_not_fit_are_refused_before_training(workplace, capsys):
    assert cli.main(["compare", *OWN, "--per_device_eval_batch_size", "6", "--output_dir", "out"]) == 1
    assert "Set per_device_eval_batch_size=4" in capsys.readouterr().err
    assert not (workplace / "out" / "arms").exists()
