"""A damaged or unfinished checkpoint is found by its manifest: passed over, or refused by name."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import ESTIMATORS, register
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.trainer.saving import manifest
from grpo_plus.trainer.saving.checkpoints import numbered, rotate, why_unusable
from grpo_plus.trainer.saving.manifest import MANIFEST, UNFINISHED
from tests.close import differing
from tests.training import PROMPTS, make_trainer, weights_of

CONFIG = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "lr_scheduler_type": "constant",
    "advantage_estimator": "ema_task",
    "task_column": "answer",
}


def trainer_in(folder: Path, **config) -> GRPOPlusTrainer:
    defaults = CONFIG | {"max_steps": 3, "trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    return make_trainer(folder, **defaults | config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    trainer_in(folder, max_steps=2).train()
    return folder


@pytest.fixture
def output(tmp_path, finished) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


DAMAGES = [
    ("model.safetensors", cut),
    ("model.safetensors", flip_a_bit),
    ("optimizer.pt", cut),
    ("optimizer.pt", Path.unlink),
    ("scheduler.pt", Path.unlink),
    ("rng_state.pth", cut),
    ("rng_state.pth", Path.unlink),
    ("trainer_state.json", write("{}")),
    ("grpo_plus_state.json", write("")),
    ("grpo_plus_state.json", write("[]")),
    ("grpo_plus_state.json", Path.unlink),
    ("grpo_plus_position_0.pt", flip_a_bit),
    ("tokenizer.json", Path.unlink),
    (MANIFEST, write("null")),
    (MANIFEST, cut),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(output, name, damage, caplog):
    damage(output / "checkpoint-2" / name)
    trainer = trainer_in(output)
    with pytest.raises(ValueError, match=rf"checkpoint-2' .*{name}.*Resume from '.*checkpoint-1'.*delete {MANIFEST}"):
        trainer._checked(str(output / "checkpoint-2"))
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        assert trainer._checked(True) == str(output / "checkpoint-1")
    assert name in caplog.text
    assert "Resuming from" in caplog.text


def test_a_run_that_passes_over_a_damaged_checkpoint_ends_with_the_weights_of_an_uninterrupted_run(output, tmp_path):
    flip_a_bit(output / "checkpoint-2/model.safetensors")
    resumed = trainer_in(output)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_in(tmp_path / "whole", save_strategy="no")
    whole.train()
    assert differing(weights_of(resumed), weights_of(whole)) == []
    assert [why_unusable(path) for path in numbered(output).values()] == [None, None, None]


def test_a_manifest_lists_every_file_and_is_written_after_all_of_them(finished):
    folder = finished / "checkpoint-2"
    content = json.loads((folder / MANIFEST).read_text())
    assert set(content["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert content["global_step"] == 2
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(content["files"])


def test_a_checkpoint_keeps_the_save_limit_of_its_run(tmp_path):
    trainer_in(tmp_path, save_total_limit=1).train()
    assert list(numbered(tmp_path)) == [3]
    assert torch.load(tmp_path / "checkpoint-3/training_args.bin", weights_only=False).save_total_limit == 1


def test_the_oldest_checkpoints_go_and_the_best_stays(tmp_path):
    for step in (9, 10, 11, 2):  # the order in which they were written
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (0, 100 if step == 2 else step))
    newest, best = tmp_path / "checkpoint-2", tmp_path / "checkpoint-9"
    rotate(tmp_path, None, keep={newest})
    assert list(numbered(tmp_path)) == [11, 10, 9, 2]
    rotate(tmp_path, 3, keep={newest, best})
    assert list(numbered(tmp_path)) == [11, 9, 2]
    rotate(tmp_path, 1, keep={newest, best})
    assert list(numbered(tmp_path)) == [9, 2]
    rotate(tmp_path, 1, keep={newest})
    assert list(numbered(tmp_path)) == [2]


def test_a_best_model_that_was_damaged_is_not_loaded(tmp_path, caplog):
    class Damages(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            flip_a_bit(tmp_path / f"checkpoint-{state.global_step}/model.safetensors")

    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    dataset = PROMPTS.select(range(2))
    trainer = trainer_in(
        tmp_path,
        max_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        trainer_arguments={"callbacks": [Damages()], "eval_dataset": dataset},
        **evaluation,
    )
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        trainer.train()
    assert "model.safetensors that is not what was written" in caplog.text
    assert "keeps its last weights" in caplog.text


def test_a_reference_that_no_checkpoint_holds_is_said_at_construction(tmp_path, inside, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(inside / "base")
    trainer = trainer_in(tmp_path, model=model, beta=0.1, sync_ref_model=True)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.warns(UserWarning, match="sync_ref_model=True: FSDP and DeepSpeed"):
        trainer._warn_of_what_no_checkpoint_holds()


@pytest.mark.parametrize("last", ["entropy_ctrl_state.json", "grpo_plus_position_0.pt", MANIFEST])
def test_a_save_that_ends_early_leaves_an_unfinished_folder_and_the_checkpoint_before(tmp_path, last, monkeypatch):
    """Whichever file a kill falls on, older checkpoints are still there."""

    class Killed(BaseException):
        pass

    def sync(path: Path) -> None:
        if path.name.startswith(last) and path.parent.name == "checkpoint-2":
            raise Killed

    monkeypatch.setattr(manifest, "_sync", sync)
    trainer = trainer_in(tmp_path, save_total_limit=1, use_adaptive_entropy=True, entropy_target=1.0)
    with pytest.raises(Killed):
        trainer.train()
    assert list(numbered(tmp_path)) == [2, 1]
    assert why_unusable(tmp_path / "checkpoint-1") is None
    assert "saving was interrupted" in why_unusable(tmp_path / "checkpoint-2")
    assert trainer_in(tmp_path)._checked(True) == str(tmp_path / "checkpoint-1")


def test_a_folder_that_is_written_over_keeps_nothing_of_the_earlier_checkpoint(output):
    folder = output / "checkpoint-2"
    (folder / "rng_state_1.pth").touch()
    (folder / "notes.txt").touch()
    manifest.begin(folder)
    assert "saving was interrupted" in why_unusable(folder)
    left = {path.name for path in folder.iterdir()}
    assert {"notes.txt", UNFINISHED} <= left
    assert left.isdisjoint({"rng_state_1.pth", "model.safetensors", "grpo_plus_state.json", MANIFEST})


def test_without_its_manifest_a_checkpoint_is_not_chosen_and_resumes_where_it_is_named(output, caplog):
    (output / "checkpoint-2" / MANIFEST).unlink()
    trainer = trainer_in(output)
    assert trainer._checked(True) == str(output / "checkpoint-1")
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert "nobody checked whether its files are whole" in caplog.text
    assert trainer.state.global_step == 3


def test_no_checkpoint_at_all_is_an_error_that_says_what_was_found(tmp_path):
    manifest.begin(tmp_path / "checkpoint-4")
    trainer = trainer_in(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint to go on from: .*checkpoint-4 has no .*unset to start from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-4' has no .*interrupted.*No older checkpoint beside it is whole"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"checkpoint-5' is no folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("lost", [None, "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_stock_trl_resumes_with_one_line(tmp_path, lost, caplog):
    stock = {name: value for name, value in CONFIG.items() if name not in ("advantage_estimator", "task_column")}
    make_trainer(tmp_path, trainer_class=GRPOTrainer, **stock).train()
    if lost:
        (tmp_path / "checkpoint-2" / lost).unlink()
    trainer = trainer_in(tmp_path, advantage_estimator=None, task_column=None)
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        trainer.train(resume_from_checkpoint=True)
    (line,) = [record.message for record in caplog.records if record.name == "grpo_plus"]
    assert "nobody checked" in line
    assert (f"has no {lost}" in line) if lost else ("anew" not in line)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no such")])
def test_a_file_that_is_cut_off_is_found_without_a_manifest_too(output, name, damage):
    folder = output / "checkpoint-2"
    (folder / MANIFEST).unlink()
    assert why_unusable(folder) is None
    damage(folder / name)
    assert why_unusable(folder) == f"has a {name} that is damaged"


def test_weights_and_moments_that_are_not_finite_are_not_resumed(output):
    folder = output / "checkpoint-2"
    (folder / MANIFEST).unlink()
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg"].view(-1)[0] = math.inf
    torch.save(state, folder / "optimizer.pt")
    with pytest.raises(ValueError, match="The optimizer's state in .*checkpoint-2 is not finite"):
        trainer_in(output).train(resume_from_checkpoint=str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The weight 'lm_head.weight' \(one of 1\) in .*checkpoint-2 is not finite"):
        trainer_in(output).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}}', None])
def test_a_manifest_that_lists_nothing_is_no_manifest(output, content):
    path = output / "checkpoint-2" / MANIFEST
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)
    assert why_unusable(path.parent) == f"has a {MANIFEST} that is damaged"


DAMAGED_STATES = ["{}", "[]", "", '{"global_step": "2"}', '{"global_step": 2, "log_history": 3}']
DAMAGED_STATES += ['{"global_step": 2, "epoch": "1"}', '{"global_step": 2, "globalstep": 2}']


@pytest.mark.parametrize("content", DAMAGED_STATES)
def test_a_trainer_state_that_cannot_be_read_is_found_without_a_manifest_too(tmp_path, content):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(content)
    assert "trainer_state.json" in why_unusable(folder)


def test_a_checkpoint_of_the_model_only_says_that_the_optimizer_starts_anew(tmp_path, caplog):
    trainer_in(tmp_path, max_steps=1, save_only_model=True).train()
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    assert "save_only_model=True. The optimizer" in caplog.text


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-11.bak"):
        (tmp_path / name).mkdir()
    assert list(numbered(tmp_path)) == [10, 9]


def test_a_checkpoint_is_uploaded_after_it_was_sealed(tmp_path, monkeypatch):
    seen = []
    trainer = trainer_in(tmp_path, max_steps=1)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(
        GRPOTrainer, "_push_from_checkpoint", lambda self, folder: seen.append(why_unusable(Path(folder)))
    )
    trainer.train()
    assert seen == [None]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("estimator", "state", "words"),
    [
        ("ema_task", {"3": [NAN, 1.0]}, r"'ema_task' holds \[nan, 1.0\] for '3'"),
        ("ema_task", {"3": [0.5, INF]}, "finite numbers belong"),
        ("ema_task", {"3": [0.5, -1.0]}, "finite numbers belong"),
        ("ema_task", {"3": [0.5, 1.0, 1.0, 1.0]}, "finite numbers belong"),
        ("popart", {"3": [0.5]}, "finite numbers belong"),
        ("popart", {"3": [0.5, "1"]}, "finite numbers belong"),
        ("popart", {"3": 0.5}, "finite numbers belong"),
        ("spo", {"3": [0, 0]}, "successes and of failures"),
        ("ema_task", [], r"is \[\], where a dictionary"),
        ("mine", None, "is None, where a dictionary"),
    ],
)
def test_a_damaged_memory_is_refused(tmp_path, estimator, state, words):
    trainer = trainer_in(tmp_path)
    with pytest.raises(ValueError, match=rf"grpo_plus_state.json .*{words}.*Resume from an older checkpoint"):
        trainer.load_running_state({"estimator": estimator, "estimator_state": state})


@pytest.mark.parametrize("beta", [NAN, -0.1, "0.1", None, True])
def test_a_damaged_beta_is_refused(tmp_path, beta):
    with pytest.raises(ValueError, match=r"grpo_plus_state.json .*beta is .*, where a finite number"):
        trainer_in(tmp_path).load_running_state({"beta": beta})


@pytest.mark.parametrize("content", ["", "[]", "null", "{"])
def test_a_state_that_is_no_dictionary_names_its_file_without_a_manifest_too(output, content):
    folder = output / "checkpoint-2"
    (folder / MANIFEST).unlink()
    (folder / "grpo_plus_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"grpo_plus_state.json is damaged: it must hold a JSON dictionary"):
        trainer_in(output).train(resume_from_checkpoint=str(folder))


def test_a_users_memory_may_hold_infinities_and_replaces_what_came_later(tmp_path):
    with ESTIMATORS.temporarily():

        @register("forgets_nothing", stateful=True)
        def forgets_nothing(rewards, state):
            return rewards.total()

        trainer = trainer_in(tmp_path, advantage_estimator="forgets_nothing")
        trainer.estimator_state["later"] = 1.0
        saved = {"best": INF, "seen": ["a"]}
        trainer.load_running_state({"estimator": "forgets_nothing", "estimator_state": saved})
        assert trainer.estimator_state == saved
        with pytest.warns(UserWarning, match="starts without memory"):
            trainer.load_running_state({})
        assert trainer.estimator_state == {}


class Verdict(IntEnum):
    RIGHT = 1


def test_what_a_reward_function_logs_can_be_loaded_again(tmp_path):
    """numpy's numbers and an enumeration are subclasses of float, str and int, which torch.load refuses."""

    def judged(completions, log_extra, log_metric, **_):
        values = [np.float64(0.5), Verdict.RIGHT, np.str_("x"), np.array([1, 2]), {"a": (np.int64(3),)}, Path("y")]
        log_extra("verdict", [values[index % len(values)] for index in range(len(completions))])
        log_metric("share", np.float32(0.25))
        return [np.float64(len(text)) for text in completions]

    config = {"num_iterations": 2, "max_steps": 2, "reward_funcs": [judged], "advantage_estimator": None}
    trainer_in(tmp_path, per_device_train_batch_size=8, **config | {"max_steps": 1}).train()
    content = torch.load(tmp_path / "checkpoint-1/grpo_plus_position_0.pt", weights_only=True)
    assert content["table"]["extra"]["verdict"][:6] == [0.5, 1, "x", [1, 2], {"a": [3]}, "y"]
    assert {type(value) for value in content["table"]["extra"]["verdict"][:3]} == {float, int, str}
    trainer = trainer_in(tmp_path, per_device_train_batch_size=8, **config)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("damage", [cut, partial(torch.save, {}), partial(torch.save, 3)])
def test_a_position_that_cannot_be_read_names_its_file(output, damage):
    folder = output / "checkpoint-2"
    (folder / MANIFEST).unlink()
    damage(folder / "grpo_plus_position_0.pt")
    with pytest.raises(ValueError, match=r"grpo_plus_position_0.pt cannot be read .*delete the file to go on"):
        trainer_in(output).train(resume_from_checkpoint=str(folder))


CHANGES = [
    {"num_iterations": 3},
    {"steps_per_generation": 4},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 2},
    {"per_device_train_batch_size": 8},
    {"num_generations": 2},
    {"beta": 0.1},
    {"loss_type": "bnpo"},
    {"advantage_estimator": "rloo"},
]


@pytest.fixture(scope="module")
def inside(tmp_path_factory) -> Path:
    """A checkpoint inside a generation batch, and the model that it began from."""
    folder = tmp_path_factory.mktemp("inside")
    tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2).save_pretrained(folder / "base")
    trainer_in(folder, num_iterations=2, max_steps=1).train()
    return folder


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_another_setting_goes_on_with_a_fresh_batch_and_one_warning(tmp_path, inside, change, caplog):
    model = AutoModelForCausalLM.from_pretrained(inside / "base")
    trainer = trainer_in(tmp_path, **{"num_iterations": 2, "model": model} | change)
    batches = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (batches.append(len(inputs)), generate(inputs))[1]
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        trainer.train(resume_from_checkpoint=str(inside / "checkpoint-1"))
    (line,) = [record.message for record in caplog.records if "fresh" in record.message]
    name = "beta above 0" if "beta" in change else next(iter(change))
    assert f"{name} was" in line
    assert trainer.state.global_step == 3
    assert len(batches) == max(
        1,
        math.ceil(
            2 * trainer.args.gradient_accumulation_steps / trainer.args.steps_per_generation / trainer.num_iterations
        ),
    )


def test_a_running_state_that_json_cannot_hold_is_an_error_that_names_the_hook(tmp_path):
    class Remembers(GRPOPlusTrainer):
        def running_state(self):
            return {"mean": torch.zeros(2)}

    with pytest.raises(ValueError, match=r"running_state returned .*Tensor.*tolist"):
        trainer_in(tmp_path, trainer_class=Remembers, max_steps=1).train()


def test_a_running_state_of_numpys_numbers_is_saved(tmp_path):
    class Remembers(GRPOPlusTrainer):
        def running_state(self):
            return {"mean": np.float64(0.25), "others": (1, 2)}

    trainer_in(tmp_path, trainer_class=Remembers, max_steps=1).train()
    assert json.loads((tmp_path / "checkpoint-1/grpo_plus_state.json").read_text()) == {"mean": 0.25, "others": [1, 2]}
