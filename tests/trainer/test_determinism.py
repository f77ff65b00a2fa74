"""A deterministic run repeats itself to the bit, whatever the clock and the free memory say, and leaves no setting."""

import json
import logging
import os
import subprocess
from itertools import count

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer import speed
from grpo_plus.trainer.safety.determinism import FLASH, WORKSPACE, choose_workspace, deterministic_algorithms
from grpo_plus.trainer.saving.manifest import MANIFEST, weights_sha256
from grpo_plus.trainer.update import passes
from tests.close import differing
from tests.refilling import MIXED, is_dead
from tests.training import logs_of, make_trainer, weights_of

# Refills, skipped rows, adapters, packing, the grouped loop, and checkpoints inside a generation batch.
SETTINGS = {
    "deterministic": True,
    "advantage_estimator": "rloo",
    "max_refills": 1,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
}


def settings():
    """What of the process a training sets."""
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return *algorithms, cudnn.deterministic, cudnn.benchmark, os.environ.get(FLASH)


class Process:
    """Trains on a clock and with a free memory of its own."""

    def __init__(self, monkeypatch, *, seconds, fitting):
        self.seconds, self.fitting, self.seen = seconds, fitting, set()
        self.monkeypatch = monkeypatch

    def judge(self, prompts, completions, **_):
        self.seen.add(settings())
        return [0.7 if is_dead(prompt) else len(text) / 8 for prompt, text in zip(prompts, completions, strict=True)]

    def train(self, folder, resume=None, **config):
        self.monkeypatch.setattr(speed, "MEASURED_ON", ("cpu",))
        self.monkeypatch.setattr(passes, "tokens_that_fit", lambda *_: self.fitting)
        trainer = make_trainer(
            folder,
            trainer_class=GRPOPlusTrainer,
            config_class=GRPOPlusConfig,
            reward_funcs=[self.judge],
            train_dataset=MIXED,
            trainer_arguments={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
            **SETTINGS | config,
        )
        if trainer.speed.measure is not None:
            readings = count()
            trainer.speed.measure.clock_of = lambda device: lambda: self.seconds(next(readings))
        trainer.train(resume_from_checkpoint=resume)
        return trainer


def manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


@pytest.fixture
def processes(monkeypatch):
    """On the first, later ways of computing seem slower. On the second they seem faster, and memory is short."""
    return (
        Process(monkeypatch, seconds=lambda reading: reading**2, fitting=None),
        Process(monkeypatch, seconds=lambda reading: reading**0.5, fitting=16),
    )


def test_two_runs_and_one_that_resumes_end_with_the_same_bits(tmp_path, processes, caplog):
    before = settings()
    with caplog.at_level(logging.INFO, "grpo_plus"):
        first = processes[0].train(tmp_path / "first")
    second = processes[1].train(tmp_path / "second")
    resumed = processes[1].train(tmp_path / "resumed", str(tmp_path / "first/checkpoint-3"))
    for other in (second, resumed):
        assert differing(weights_of(other), weights_of(first)) == []
        trained = [{k: v for k, v in entry.items() if k != "train_loss"} for entry in logs_of(other)]
        assert trained == [{k: v for k, v in entry.items() if k != "train_loss"} for entry in logs_of(first)]
    for step in (3, 4):
        ours, theirs = (manifest(tmp_path / name / f"checkpoint-{step}") for name in ("first", "second"))
        assert ours["weights_sha256"] == theirs["weights_sha256"]
        assert ours["files"]["optimizer.pt"] == theirs["files"]["optimizer.pt"]
    assert (
        f"checkpoint-4 have the SHA-256 {manifest(tmp_path / 'resumed/checkpoint-4')['weights_sha256']}" in caplog.text
    )
    assert manifest(tmp_path / "first/checkpoint-3")["weights_sha256"] not in (None, ours["weights_sha256"])
    # The mode was on in every reward call, every part of the run was active, and nothing stays set.
    assert processes[0].seen == processes[1].seen == {(True, False, True, False, "1")}
    assert settings() == before
    log = first.state.log_history
    assert first.speed.packer.describe().startswith("shared_prompt")
    assert any(entry.get("sampling/refills") for entry in log)
    assert any(entry.get("packing/live_fraction", 1.0) < 1.0 for entry in log)
    assert any(entry.get("rollout/prompt_sharing", 1.0) > 1.0 for entry in log)


def test_the_hash_of_the_weights_is_what_a_shell_computes(tmp_path):
    files = {}
    for name in ("model-2.safetensors", "model-1.safetensors", "optimizer.pt"):
        (tmp_path / name).write_text(name)
        command = ["sha256sum", name]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        files[name] = {"sha256": printed.split()[0]}
    command = "sha256sum *.safetensors | sha256sum"
    printed = subprocess.run(command, cwd=tmp_path, shell=True, capture_output=True, text=True, check=True).stdout
    assert weights_sha256(files) == printed.split()[0]
    assert weights_sha256({"optimizer.pt": files["optimizer.pt"], "part/model.safetensors": {}}) is None


def test_settings_of_the_process_come_back_after_an_error(monkeypatch):
    monkeypatch.setenv(FLASH, "0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with pytest.raises(KeyboardInterrupt), deterministic_algorithms():
            raise KeyboardInterrupt
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_cublas_gets_its_setting_and_another_one_is_refused(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    choose_workspace()
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, but .*':0:0'. Unset it"):
        choose_workspace()
    monkeypatch.delenv(WORKSPACE)
    choose_workspace()
    assert os.environ[WORKSPACE] == ":4096:8"
