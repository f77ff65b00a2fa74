"""A mixture-of-experts model: its router's auxiliary loss is TRL's business, and a loss of ours says so at once."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_tokenizer
from tests.close import assert_close, differing
from tests.training import logs_of, make_trainer, weights_of


def tiny_experts() -> PreTrainedModel:
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def experts_trainer(output_dir, loss_type, **arguments):
    arguments = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig, "max_steps": 2, **arguments}
    return make_trainer(output_dir, model=tiny_experts(), loss_type=loss_type, **arguments)


@pytest.mark.newest_trl
def test_a_loss_of_ours_that_would_lose_the_auxiliary_loss_is_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match=r"loss_type='gmpo' .* router_aux_loss_coef=0\.5.*router_aux_loss_coef=0\.0"):
        experts_trainer(tmp_path, "gmpo")


@pytest.mark.newest_trl
def test_a_loss_of_ours_trains_without_the_auxiliary_loss(tmp_path):
    trainer = experts_trainer(tmp_path, "gmpo", router_aux_loss_coef=0.0)
    start = weights_of(trainer)
    trainer.train()
    assert differing(weights_of(trainer), start)


def test_a_loss_of_trls_trains_with_it(tmp_path):
    trainer = experts_trainer(tmp_path, "grpo", advantage_estimator="rloo")
    start = weights_of(trainer)
    trainer.train()
    assert [entry for entry in logs_of(trainer)[:2] if entry["aux_loss"] <= 0] == []
    assert differing(weights_of(trainer), start)


@pytest.mark.newest_trl
def test_without_the_auxiliary_loss_rows_are_packed_and_train_as_under_trl(tmp_path, caplog):
    def weights_after_training(name, **classes):
        trainer = experts_trainer(tmp_path / name, "grpo", router_aux_loss_coef=0.0, learning_rate=1e-3, **classes)
        trainer.train()
        return trainer, weights_of(trainer)

    with warnings.catch_warnings(), caplog.at_level("INFO", logger="grpo_plus"):
        warnings.filterwarnings("error", message="packing|generation_loop")
        trainer, ours = weights_after_training("ours")
    assert [line for line in caplog.messages if "self-check" in line] == []
    assert logs_of(trainer)[0]["packing/token_ratio"] > 1
    _, trls = weights_after_training("trl", trainer_class=GRPOTrainer, config_class=GRPOConfig)
    for name, weight in ours.items():
        assert_close(name, weight, trls[name], rtol=1e-5)
