import functools
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_plus import GRPOPlusConfig
from grpo_plus.compare import train
from grpo_plus.compare.report import write_comparison
from grpo_plus.compare.store import agree, claim, read_json
from grpo_plus.compare.train import Arm, Variant, compare
from grpo_plus.demo.tiny import tiny_model
from tests.compare import small
from tests.compare.small import TOKENIZER, sizes, small_task
from tests.training import NOT_REPRODUCIBLE

CHANGING = NOT_REPRODUCIBLE | {"train_loss"}


def numbers(comparison, variant, seed=0):
    """What must be equal for equal trainings: the log without its clocks, and the scores."""
    arm = Arm(variant, seed)
    log = [{k: v for k, v in entry.items() if k not in CHANGING} for entry in comparison.log(arm)]
    return log, comparison.results[arm].scores


def count_trainings(monkeypatch):
    """The names of the arms that were really trained."""
    names = []
    real = train.train_arm
    monkeypatch.setattr(
        train,
        "train_arm",
        lambda task, start, arm, *rest, **kw: names.append(arm.name) or real(task, start, arm, *rest, **kw),
    )
    return names


def adapters():
    model = tiny_model(TOKENIZER, hidden_size=32, num_heads=2, num_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["full", "adapters, a reference, checkpointed"])
def test_an_arm_is_the_same_after_others_as_alone(tmp_path, kind):
    task = small_task()
    if kind != "full":
        settings = {"beta": 0.1, "gradient_checkpointing": True}
        task = replace(task, start=adapters, config=functools.partial(task.config, **settings))
    last = Variant("dr_grpo")
    after = compare(task, [Variant("grpo"), last], [0], tmp_path / "after")
    alone = compare(task, [last], [0], tmp_path / "alone")
    assert not after.failures
    assert numbers(after, last) == numbers(alone, last)
    assert after.start == alone.start
    assert after.results[Arm(last, 0)].scores != after.start  # it has learned something


def test_variants_see_the_same_prompts_under_a_seed_and_others_under_another(tmp_path):
    seen = {}

    def trainer(model, config):
        def noted(prompts, completions, **_):
            seen.setdefault((config.advantage_estimator, config.seed), []).extend(prompts)
            return [0.0] * len(prompts)

        return small.trainer(model, config, [noted, small.vowels])

    compare(small_task(trainer=trainer), ["grpo", "rloo"], [0, 1], tmp_path)
    assert seen["grpo", 0] == seen["rloo", 0]
    assert seen["grpo", 1] == seen["rloo", 1]
    assert seen["grpo", 0] != seen["grpo", 1]


def test_what_is_finished_is_not_trained_again_and_more_seeds_may_follow(tmp_path, monkeypatch):
    names = count_trainings(monkeypatch)
    first = compare(small_task(), ["grpo"], [0], tmp_path)
    again = compare(small_task(), ["grpo", "rloo"], [0, 1], tmp_path)
    assert names == ["grpo, seed 0", "rloo, seed 0", "grpo, seed 1", "rloo, seed 1"]
    assert again.results[first.arms[0]] == first.results[first.arms[0]]
    compare(small_task(start=lambda: pytest.fail("nothing is left to train")), ["grpo", "rloo"], [0, 1], tmp_path)


def test_an_arm_that_was_cut_off_is_trained_again_from_the_beginning(tmp_path):
    whole = compare(small_task(), ["grpo"], [0], tmp_path / "whole")
    folder = tmp_path / "cut" / "arms" / "grpo-seed0"
    compare(small_task(), ["grpo"], [0], tmp_path / "cut")
    (folder / "result.json").unlink()  # written last
    (folder / "completions").mkdir()
    (folder / "completions" / "of_the_killed_run").touch()
    again = compare(small_task(), ["grpo"], [0], tmp_path / "cut")
    assert numbers(again, Variant("grpo")) == numbers(whole, Variant("grpo"))
    assert not (folder / "completions").exists()


def test_a_failing_arm_is_recorded_and_the_others_go_on(tmp_path, capsys):
    broken = True

    def trainer(model, config):
        def judge(completions, **_):
            if broken and config.advantage_estimator == "grpo":
                raise RuntimeError("the judge is asleep")
            return small.vowels(completions)

        return small.trainer(model, config, [judge, small.brevity])

    task = small_task(trainer=trainer)
    comparison = compare(task, ["grpo", "rloo"], [0], tmp_path, progress=True)
    grpo, rloo = comparison.arms
    assert set(comparison.results) == {rloo}
    assert "the judge is asleep" in comparison.failures[grpo]
    assert "Traceback" in (tmp_path / "arms" / "grpo-seed0" / "error.txt").read_text()
    assert (
        "[1/2] grpo, seed 0: failed: RewardFunctionError: The reward function 'judge' raised" in capsys.readouterr().out
    )
    broken = False
    again = compare(task, ["grpo", "rloo"], [0], tmp_path)
    assert set(again.results) == {grpo, rloo}
    assert not again.failures
    assert not (tmp_path / "arms" / "grpo-seed0" / "error.txt").exists()


def test_an_interrupt_is_no_failure(tmp_path):
    def interrupted(trainer):
        if trainer.state.global_step:
            raise KeyboardInterrupt
        return small.sizes(trainer)

    with pytest.raises(KeyboardInterrupt):
        compare(small_task(evaluate=interrupted), ["grpo", "rloo"], [0], tmp_path)
    assert [path.name for path in (tmp_path / "arms").iterdir()] == ["grpo-seed0"]
    assert not (tmp_path / "arms" / "grpo-seed0" / "error.txt").exists()


def test_a_sigterm_ends_the_comparison_and_not_with_success(tmp_path):
    def terminated(completions, **_):
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # in a training, and not where the start is measured
            signal.raise_signal(signal.SIGTERM)
        return [0.0] * len(completions)

    task = small_task(trainer=functools.partial(small.trainer, rewards=[terminated]))
    with pytest.raises(SystemExit) as left:
        compare(task, [Variant("grpo")], [0], tmp_path)
    assert left.value.code == 128 + signal.SIGTERM


def test_an_arm_that_another_process_holds_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WAIT", 0.05)
    names = count_trainings(monkeypatch)
    compare(small_task(), ["rloo"], [0], tmp_path)
    code = "import sys\nfrom pathlib import Path\nfrom grpo_plus.compare.store import claim\n"
    code += "with claim(Path(sys.argv[1])) as mine:\n    print(mine, flush=True)\n    sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    folder = tmp_path / "arms" / "grpo-seed0"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == "True\n"
    with claim(folder) as mine:
        assert not mine
    timer = threading.Timer(1.0, holder.kill)  # as kill -9 would: the lock goes with the process
    timer.start()
    comparison = compare(small_task(), ["grpo", "rloo"], [0], tmp_path)
    assert holder.wait() == -9
    assert names == ["rloo, seed 0", "grpo, seed 0"]
    assert len(comparison.results) == 2


@pytest.mark.parametrize("given", [{"other": [1.0, 2.0]}, {"score": [1.0]}], ids=["name", "items"])
def test_an_arm_with_other_scores_than_the_start_fails_alone(tmp_path, given):
    def evaluate(trainer):
        odd = trainer.state.global_step and trainer.args.advantage_estimator == "grpo"
        return given if odd else {"score": [1.0, 2.0]}

    comparison = compare(small_task(evaluate=evaluate), ["grpo", "rloo"], [0], tmp_path)
    grpo, rloo = comparison.arms
    assert set(comparison.results) == {rloo}
    assert "but {'score': 2} at the start" in comparison.failures[grpo]


@pytest.mark.parametrize(("arguments", "message"), [
    ((["dr_grop"], [0]), "Did you mean 'dr_grpo'"),
    (([Variant("grpo", fields={"advantage_kwargs": {"ddoff": 1}})], [0]), "takes no keyword 'ddoff'"),
    (([Variant("grpo", fields={"lerning_rate": 1})], [0]), "lerning_rate"),
    (([Variant("grpo", fields={"use_vllm": True})], [0]), "use_vllm=True: every arm would start an engine"),
    (([], [0]), "at least one estimator"),
    ((["grpo"], []), "at least 1 seed"),
    ((["grpo"], [-1]), "seed=-1"),
    ((["grpo"], [0, 0]), "'grpo, seed 0' is there twice"),
    (([Variant("grpo"), Variant("grpo")], [0]), "is there twice"),
], ids=["estimator", "keyword", "field", "engine", "none", "no seed", "seed", "seed twice", "twice"])  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_any_work(tmp_path, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compare(small_task(start=lambda: pytest.fail("work")), *arguments, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_loss_or_a_field_that_is_the_comparisons_own_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'cispo'"):
        Variant("grpo", "cisp")
    with pytest.raises(ValueError, match="sets seed, which the comparison sets itself"):
        Variant("grpo", fields={"seed": 1})


def test_a_folder_of_another_comparison_is_refused(tmp_path):
    folder = tmp_path / "mit Leerzeichen 結果"
    compare(small_task(), [Variant("grpo", label="a b")], [0], folder)
    other = small_task()
    other = replace(other, config=functools.partial(other.config, max_steps=3))
    with pytest.raises(ValueError, match=r"config.max_steps: 2 there, 3 here"):
        compare(other, ["rloo"], [0], folder)
    with pytest.raises(ValueError, match="advantage_estimator: grpo there, rloo here"):
        compare(small_task(), [Variant("rloo", label="a b")], [0], folder)
    with pytest.raises(ValueError, match="sha256"):
        compare(small_task(start=adapters), ["rloo"], [0], folder)
    assert [path.name for path in (folder / "arms").iterdir()] == ["a-b-seed0"]


def test_a_result_says_what_it_cost(tmp_path):
    result = next(iter(compare(small_task(), ["grpo"], [3], tmp_path).results.values()))
    assert result.steps == 2
    assert 0 < result.seconds < 60
    assert result.cpu_seconds > 0
    assert result.tokens > 2 * 8 * 4
    assert result.peak_bytes > 1e6
    assert set(result.versions) == {"grpo_plus", "trl", "transformers", "torch", "python"}
    assert read_json(tmp_path / "comparison.json")["config"]["num_generations"] == 4
    assert isinstance(small_task().config(output_dir="x"), GRPOPlusConfig)


def failing(token):
    def evaluate(trainer):
        if trainer.state.global_step:
            raise OSError(f"401: the hub does not know {token}")
        return sizes(trainer)

    return evaluate


def test_a_token_is_in_no_file_of_a_comparison(tmp_path):
    token = "open-sesame-17"
    task = small_task(evaluate=failing(token), facts={"loading": {"nested": {"token": token}}})
    task = replace(task, config=functools.partial(task.config, model_init_kwargs={"token": token}, max_steps=1))
    variant = Variant("rloo", fields={"hub_token": token})
    comparison = compare(task, [variant], [0], tmp_path)
    write_comparison(comparison, tmp_path)
    texts = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"comparison.json", "report.html", "error.txt", "arm.json"} <= set(texts)
    assert b"the hub does not know ***" in texts["error.txt"]
    assert [name for name, text in texts.items() if token.encode() in text] == []


def test_another_token_is_no_other_comparison_and_an_old_file_loses_its_token(tmp_path):
    path = tmp_path / "comparison.json"
    path.write_text('{"config": {"api_key": "old", "x": 1}}')
    agree(path, {"config": {"api_key": "new", "x": 1}}, "a comparison")
    assert read_json(path) == {"config": {"api_key": "***", "x": 1}}
