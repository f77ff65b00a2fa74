"""A run that is killed while it saves goes on from the checkpoint before, to the last bit."""

import logging
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerState

from grpo_plus.qlora.checks import saved_adapter
from grpo_plus.trainer.saving.checkpoints import why_unusable
from tests.close import differing
from tests.forked import exit_code, started
from tests.qlora.models import load_nf4, lora, make_qlora_trainer, trained_weights
from tests.training import PROMPTS

CONFIG = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
# Each generation batch is trained on twice: the checkpoint before the kill stands inside of one.
REUSED = CONFIG | {"num_iterations": 2}


def train_until_killed(folder, base):
    """The process dies with the second checkpoint's last file half written."""
    save = TrainerState.save_to_json

    def save_half(state, path):
        save(state, path)
        if state.global_step == 2:
            text = Path(path).read_text()
            Path(path).write_text(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    TrainerState.save_to_json = save_half
    make_qlora_trainer(folder, base, **REUSED).train()


@pytest.fixture(scope="module")
def killed(tmp_path_factory, base):
    """The output of a run that was killed while it saved its second checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    assert exit_code(started(train_until_killed, folder, base)) == -signal.SIGKILL
    return folder


def test_the_checkpoint_before_is_whole_and_goes_on_to_the_same_weights(tmp_path, killed, base, caplog):
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert why_unusable(killed / "checkpoint-1") is None
    resumed = make_qlora_trainer(killed, base, **REUSED)
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        resumed.train(resume_from_checkpoint=True)
    assert re.search("checkpoint-2 has no .*: its saving was interrupted", caplog.text)
    whole = make_qlora_trainer(tmp_path, base, **REUSED | {"save_strategy": "no"})
    whole.train()
    expected = trained_weights(whole)
    assert differing(trained_weights(resumed), expected) == []
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(("adapter_dtype", "name"), [("float32", "default"), ("bfloat16", "default"), (None, "mine")])
def test_the_best_model_comes_back_in_the_dtype_it_was_trained_in(tmp_path, base, adapter_dtype, name):
    """PEFT loads every adapter in float32. transformers looks for the best weights of "default" only."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    keep = {"load_best_model_at_end": True, "save_total_limit": None, "greater_is_better": True}
    trainer = make_qlora_trainer(
        tmp_path,
        get_peft_model(load_nf4(base), lora(), adapter_name=name),
        adapter_dtype=adapter_dtype,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(2))},
        **CONFIG | evaluation | keep | {"num_generations_eval": 2, "per_device_eval_batch_size": 2},
    )
    trainer.train()
    folder = saved_adapter(trainer.state.best_model_checkpoint, name)
    saved = load_file(folder / "adapter_model.safetensors")
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    for key, weight in trained_weights(trainer).items():
        assert weight.dtype == getattr(torch, adapter_dtype or "float32")
        assert torch.equal(weight, saved[key.replace(f".{name}", "")]), key
