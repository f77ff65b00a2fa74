"""An update that runs out of memory is computed again in smaller passes, as if nothing had happened."""

import logging

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.close import differing
from tests.training import logs_of, make_trainer, weights_of

# The dropout draws random numbers in the forward, and the target moves beta with each step.
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
LAST_OF_THE_SECOND_STEP = 3
CONFIG = {
    "config_class": GRPOPlusConfig,
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
    "beta": 0.05,
    "kl_target": 0.01,
    "max_completion_length": 6,
}


class SmallCard(GRPOPlusTrainer):
    """Runs out of memory once, before or after most of the backward of one micro-batch."""

    fails_in = LAST_OF_THE_SECOND_STEP
    where = "backward"
    tries = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training and self._step == self.fails_in:
            self.tries += 1
            if self.tries == 1:
                self.arm()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def arm(self):
        first = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        hooks = []

        def fail(*_):
            hooks[0].remove()
            raise torch.OutOfMemoryError("simulated")

        def fail_in_backward(module, inputs, output):
            hooks[0].remove()
            output.requires_grad_(True).register_hook(fail)

        hooks.append(first.register_forward_hook(fail_in_backward if self.where == "backward" else fail))


class LargeCard(SmallCard):
    """Takes the passes that the small card ends with, at the same micro-batch, and never runs out of memory."""

    passes_of = 0

    def arm(self):
        self.speed.passes.tokens = self.passes_of


def trained(path, kind, **changes):
    settings = CONFIG | {"trainer_arguments": {"peft_config": LORA}} | changes
    return make_trainer(path, trainer_class=kind, **settings)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_second_try_begins_where_the_first_began(tmp_path, caplog, where):
    small = trained(tmp_path / "small", SmallCard)
    small.where = where
    with caplog.at_level(logging.WARNING, logger="grpo_plus"):
        small.train()
    assert small.tries == 2
    large = trained(tmp_path / "large", LargeCard)
    large.passes_of = small.speed.passes.tokens
    large.train()
    assert large.tries == 1
    assert differing(weights_of(small), weights_of(large)) == []
    assert logs_of(small)[:-1] == logs_of(large)[:-1]
    warned = [record.message for record in caplog.records if "ran out of memory" in record.message]
    assert len(warned) == 1
    assert f"max_tokens_per_pass={small.speed.passes.tokens}" in warned[0]


def test_a_whole_model_tries_again_as_long_as_no_gradient_of_before_has_changed(tmp_path, caplog):
    whole = {"trainer_arguments": None, "max_steps": 2, "beta": 0.0, "kl_target": None}
    small = trained(tmp_path / "small", SmallCard, **whole)
    small.where = "forward"
    small.train()
    assert small.tries == 2
    large = trained(tmp_path / "large", LargeCard, **whole)
    large.passes_of = small.speed.passes.tokens
    large.train()
    assert differing(weights_of(small), weights_of(large)) == []
    # The backward has come to the embeddings: the gradients of the first micro-batch are lost.
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        trained(tmp_path / "late", SmallCard, **whole).train()
    assert f"Set max_tokens_per_pass={small.speed.passes.tokens} and resume." in caplog.text


@pytest.mark.parametrize("size", [None, 64])
def test_a_given_size_stays_and_the_error_is_torchs(tmp_path, size):
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        trained(tmp_path, SmallCard, max_tokens_per_pass=size).train()


def test_passes_of_one_row_are_not_halved(tmp_path, caplog):
    small = trained(tmp_path, SmallCard)
    small.where = "forward"
    small.speed.passes.fitting = lambda prompt_length: 1
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        small.train()
    assert small.tries == 1
    assert "An update ran out of memory with one row at a time" in caplog.text
