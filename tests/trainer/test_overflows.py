"""What no NaN shows: a gradient whose norm overflows, and weights that were broken before the run began."""

import math

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.trainer.test_guard import Watch
from tests.training import make_trainer

OURS = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}


class Steep(GRPOPlusTrainer):
    """A finite loss in the second step, with finite gradients whose squares are not."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss * 1e30 if self.state.global_step == 1 else loss


class SteepAtFirst(Steep):
    """The same in the first micro-batch of the step alone."""

    def _compute_loss(self, model, inputs):
        of_first = self._step % self.args.gradient_accumulation_steps == 0
        return super()._compute_loss(model, inputs) if of_first else GRPOPlusTrainer._compute_loss(self, model, inputs)


def test_a_gradient_whose_norm_overflows_is_skipped_although_clipping_makes_zeros_of_it(tmp_path):
    watch = Watch()
    arguments = {"trainer_arguments": {"callbacks": [watch]}}
    trainer = make_trainer(tmp_path, **OURS | {"trainer_class": Steep}, max_steps=2, **arguments)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert "guard/skipped_steps" not in first
    assert second["guard/skipped_steps"] == 1
    assert math.isfinite(second["loss"])
    # Adam's momentum would have moved them on.
    assert all(map(torch.equal, *watch.weights))


def test_a_norm_that_overflows_in_an_earlier_micro_batch_is_skipped_too(tmp_path):
    # While an update may have to be tried again, the gradients of adapters' earlier micro-batches are put aside.
    arguments = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, **OURS | {"trainer_class": SteepAtFirst}, trainer_arguments=arguments, **sizes)
    trainer.train()
    skipped = [entry.get("guard/skipped_steps") for entry in trainer.state.log_history if "grad_norm" in entry]
    assert skipped == [None, 1]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["trained", "frozen"])
def test_a_weight_that_is_broken_before_the_run_is_named(tmp_path, adapter):
    trainer = make_trainer(tmp_path, **OURS, trainer_arguments={"peft_config": adapter})
    name, weight = next(entry for entry in trainer.model.named_parameters() if "embed_tokens" in entry[0])
    weight.data[5, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"The weight '{name}' \(one of 1\) is not finite before the first step"):
        trainer.train()
