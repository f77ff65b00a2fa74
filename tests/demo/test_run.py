import copy
import json
import random
from dataclasses import asdict
from functools import cache

import matplotlib.image
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_plus.demo import run
from grpo_plus.demo.run import run_demo
from grpo_plus.demo.task import complete
from grpo_plus.demo.tiny import tiny_tokenizer
from grpo_plus.replay import Rollouts, replay
from tests.training import NOT_REPRODUCIBLE

SUMMARY_KEYS = {
    "accuracy_before",
    "accuracy_after",
    "seed",
    "steps",
    "seconds",
    "switches",
    "examples",
    "versions",
}


def read_log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def _few_held_out_prompts():
    """Ten exams of 500 prompts each take longer than the training between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "NUM_HELD_OUT", 100)
        yield


@pytest.fixture
def warm_up_shared(monkeypatch, warmed_up):
    """The two trainings that learn start from one warm-up, which takes as long as either."""
    monkeypatch.setattr(run, "warmed_up_model", lambda _, seed, steps: copy.deepcopy(warmed_up(seed, steps)))


@pytest.fixture(scope="module")
def warmed_up():
    made = run.warmed_up_model
    return cache(lambda seed, steps: made(tiny_tokenizer(), seed, steps))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    result = run_demo(directory, seed=3, max_steps=2, warm_up_steps=20, advantage_estimator="dr_grpo", loss_type="grpo")
    return directory, result


def test_the_summary_holds_the_result_its_switches_and_versions(short_run):
    directory, result = short_run
    summary = json.loads((directory / "summary.json").read_text())
    assert summary.keys() == SUMMARY_KEYS
    assert {name: value for name, value in summary.items() if name != "versions"} == asdict(result)
    assert (result.seed, result.steps) == (3, 2)
    assert result.switches["advantage_estimator"] == "dr_grpo"
    assert result.switches["loss_type"] == "grpo"
    assert summary["versions"].keys() == {"grpo_plus", "trl", "transformers", "torch", "python"}


def test_every_step_is_logged_with_both_rewards_and_the_last_accuracy_is_the_result(short_run):
    directory, result = short_run
    steps = [entry for entry in read_log(directory) if "reward" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        assert 0 <= entry["rewards/correctness_reward/mean"] <= 1
        assert 0 <= entry["rewards/format_reward/mean"] <= 1
    assert steps[-1]["held_out_accuracy"] == result.accuracy_after


def test_the_picture_is_one_that_can_be_read(short_run):
    directory, _ = short_run
    picture = matplotlib.image.imread(directory / "learning_curve.png")
    assert picture.shape[:2] == (675, 1200)
    assert picture.std() > 0.05  # not blank


def test_a_seed_gives_the_same_run_again_and_with_transformers_own_loop(short_run, tmp_path, monkeypatch):
    directory, result = short_run
    random.seed(99)  # whatever ran before
    monkeypatch.setitem(run.SETTINGS, "generation_loop", "trl")
    again = run_demo(tmp_path, seed=3, max_steps=2, warm_up_steps=20, advantage_estimator="dr_grpo", loss_type="grpo")
    assert again.examples == result.examples
    for first, second in zip(read_log(directory), read_log(tmp_path), strict=True):
        assert ("rollout/prompt_sharing" in first, "rollout/prompt_sharing" in second) == ("reward" in first, False)
        shared = second.keys() - NOT_REPRODUCIBLE
        assert {name: first[name] for name in shared} == {name: second[name] for name in shared}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"advantage_estimator": "dr_grop"}, "Did you mean 'dr_grpo'"),
        ({"loss_type": "dapoo"}, "Did you mean 'dapo'"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_wrong_value_is_refused_before_any_work_is_done(wrong, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
    assert "warm-up" not in capsys.readouterr().err


def test_a_replay_reads_the_completions(short_run):
    replayed = replay(Rollouts(short_run[0]))
    assert (replayed.steps, replayed.advice.current) == ((1, 2), "dr_grpo")
    assert "dr_grpo" in replayed.same


def test_a_run_that_fails_leaves_nothing_of_an_earlier_one(tmp_path):
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "completions_00009.parquet").touch()
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RuntimeError, match="-5"):
        run_demo(tmp_path, max_steps=2, warm_up_steps=-5)
    assert not (tmp_path / "summary.json").exists()
    assert not list((tmp_path / "completions").iterdir())


def test_grpo_learns_to_sort_prompts_that_it_never_saw_and_saves_the_model_that_can(tmp_path, warm_up_shared):
    result = run_demo(tmp_path, seed=0, max_steps=40)
    assert result.accuracy_before < 0.5
    assert result.accuracy_after > 0.6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompts = [example["prompt"] for example in result.examples]
    after = [example["after"] for example in result.examples]
    assert complete(model, tokenizer, prompts) == after
    assert after != [example["before"] for example in result.examples]


def test_adapters_on_a_4_bit_base_learn_too_and_the_export_can_what_they_learned(tmp_path, capsys, warm_up_shared):
    result = run_demo(tmp_path, seed=0, max_steps=20, qlora=True)
    assert result.accuracy_after > result.accuracy_before + 0.12
    assert result.switches["qlora"] is True
    trained_in_4_bits = read_log(tmp_path)[-2]["held_out_accuracy"]
    assert result.accuracy_after == pytest.approx(trained_in_4_bits, abs=0.03)
    assert "KL to the trained model" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not hasattr(model.config, "quantization_config")
    prompts = [example["prompt"] for example in result.examples]
    assert complete(model, tokenizer, prompts) == [example["after"] for example in result.examples]


def test_qlora_without_bitsandbytes_is_refused_before_any_work_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_plus.qlora.checks.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes peft"):
        run_demo(tmp_path / "out", qlora=True)
    assert not (tmp_path / "out").exists()
