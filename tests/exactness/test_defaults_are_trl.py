"""With every speed-up switched off, training is TRL's to the last bit: weights and every logged number."""

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.config.plain import OFF
from tests.close import differing
from tests.training import logs_of, make_trainer, newest, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

ACCUMULATED = {
    "multi_objective_aggregation": "normalize_then_sum",
    "loss_type": "grpo",
    "gradient_accumulation_steps": 2,
}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
SETTINGS = [
    newest({"scale_rewards": "group"}, None, GRPOPlusConfig, id="group"),
    newest(CHECKPOINTED | {"num_iterations": 2}, LORA, GRPOPlusConfig, id="lora-2iterations-checkpoints"),
    newest({"scale_rewards": "none", "num_iterations": 2}, None, GRPOConfig, id="none-2iterations-plain"),
    newest({"scale_rewards": "none", "beta": 0.1}, LORA, GRPOPlusConfig, id="none-lora-beta"),
    newest(ACCUMULATED, None, GRPOPlusConfig, id="gdpo-accumulation"),
    pytest.param(ACCUMULATED, None, GRPOConfig, id="gdpo-accumulation-plain"),
]


@pytest.mark.parametrize(("config", "peft_config", "config_class"), SETTINGS)
def test_three_steps_are_bit_identical(tmp_path, config, peft_config, config_class):
    arguments = {"peft_config": peft_config}
    stock = make_trainer(tmp_path / "stock", trainer_arguments=arguments, **config)
    stock.train()
    ours = make_trainer(
        tmp_path / "ours",
        trainer_class=GRPOPlusTrainer,
        config_class=config_class,
        trainer_arguments=arguments,
        **(OFF if config_class is GRPOPlusConfig else {}),
        **config,
    )
    start = weights_of(ours)
    ours.train()
    without_ours = [{k: v for k, v in entry.items() if not k.startswith("advantages/")} for entry in logs_of(ours)]
    assert without_ours == logs_of(stock)
    trained = weights_of(ours)
    for name, weight in weights_of(stock).items():
        assert torch.equal(trained[name], weight), name
    assert differing(trained, start), "nothing was trained"


EQUIVALENTS = [
    ("grpo", {"scale_rewards": "group"}),
    ("dr_grpo", {"scale_rewards": "none"}),
    ("batch_std", {"scale_rewards": "batch"}),
    ("gdpo", {"multi_objective_aggregation": "normalize_then_sum"}),
]


@pytest.mark.newest_trl
@pytest.mark.parametrize(("estimator", "trl_setting"), EQUIVALENTS)
def test_an_estimator_gives_the_advantages_of_its_trl_setting(tmp_path, estimator, trl_setting):
    stock = make_trainer(tmp_path / "stock", max_steps=1, reward_weights=[1.0, 0.5], **trl_setting)
    stock.train()
    ours = make_trainer(
        tmp_path / "ours",
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        max_steps=1,
        reward_weights=[1.0, 0.5],
        advantage_estimator=estimator,
    )
    ours.train()
    expected = torch.tensor(list(stock._logs["advantages"]))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(torch.tensor(list(ours._logs["advantages"])), expected, rtol=0, atol=2e-5)
