"""The kernels inside a training, under Triton's interpreter."""

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.training import make_trainer, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.triton
def test_a_step_on_tritons_head_is_a_step_on_trls(tmp_path):
    trained = []
    for backend in ("trl", "triton"):
        made = make_trainer(
            tmp_path / backend,
            trainer_class=GRPOPlusTrainer,
            config_class=GRPOPlusConfig,
            trainer_arguments={"peft_config": LORA},
            logprob_backend=backend,
            optim="sgd",
            max_steps=1,
        )
        made.train()
        assert ("single-pass head" in made.speed.packer.describe()) == (backend == "triton")
        trained.append(weights_of(made))
    assert any(weight.any() for name, weight in trained[0].items() if "lora_B" in name)
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=1e-5, atol=1e-7, msg=name)
