"""The bound of a pass: what the free memory holds by the planner's count."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.planner import plan
from grpo_plus.planner.loaded import shape_and_run
from grpo_plus.trainer.update.passes import Passes, tokens_that_fit
from tests.training import make_trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    return make_trainer(tmp_path_factory.mktemp("run"), packing="shared_prompt", **classes)


def test_auto_is_the_tokens_of_the_rows_whose_update_fits(trainer, monkeypatch):
    assert tokens_that_fit(trainer.model, trainer.args, 10) is None  # the memory of a CPU is not asked for
    shape, run = shape_and_run(trainer.model, trainer.args, 10)
    assert run.max_tokens_per_pass == "auto"
    parts = (replace(run, per_device_train_batch_size=rows, steps_per_generation=4) for rows in (3, 4, 8))
    three, four, eight = (plan(shape, replace(part, max_tokens_per_pass=None)) for part in parts)
    context = three.constants.context_bytes
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("cuda")))
    # A part of what the planner counts is allocated already, and reserved by torch.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)

    def found(available):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (available - context - 1000, 0))
        return tokens_that_fit(trainer.model, trainer.args, 10)

    assert found(eight.phase("update")) is None
    assert found(four.phase("update") - 1) == 10 + 3 * 8  # a prompt once, and three completions
    assert found(three.phase("update")) == 10 + 3 * 8
    assert found(context) == 10 + 8


def test_a_run_that_the_planner_does_not_know_is_said(trainer, monkeypatch, caplog):
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(trainer.args, "optim", "adafactor")
    with caplog.at_level(logging.INFO, logger="grpo_plus"):
        assert tokens_that_fit(trainer.model, trainer.args, 10) is None
    assert "max_tokens_per_pass: a whole micro-batch until memory runs out. Nothing is counted: Unknown" in caplog.text


def test_the_free_memory_is_read_once(caplog):
    asked = []
    passes = Passes(fitting=lambda prompt_length: asked.append(prompt_length) or 100)
    with caplog.at_level(logging.INFO, logger="grpo_plus"):
        passes.read(7)
        passes.read(8)
    assert asked == [7]
    assert passes.tokens == 100
    assert [record.message for record in caplog.records] == [
        "max_tokens_per_pass: 100. The free memory does not hold an update of a whole micro-batch."
    ]


def test_padded_rows_count_with_their_padding():
    assert Passes().rows(None, 40) is None
    assert Passes().rows(4, 40) == 4
    assert Passes(100).rows(4, 40) == 2
    assert Passes(100).rows(None, 40) == 2
    assert Passes(100).rows(1, 40) == 1
    assert Passes(100).rows(4, 400) == 1
