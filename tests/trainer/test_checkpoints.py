"""A damaged or unfinished checkpoint is found by its manifest: passed over, or refused by name."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer import manifest
from grpo_plus.trainer.checkpoints import numbered, why_unusable
from grpo_plus.trainer.manifest import MANIFEST, UNFINISHED
from tests.close import differing
from tests.training import make_trainer, weights_of

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
    return make_trainer(
        folder, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, **{**CONFIG, "max_steps": 3} | config
    )


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


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"global_step": "2"}'])
def test_a_trainer_state_without_its_step_is_found_without_a_manifest_too(tmp_path, content):
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
