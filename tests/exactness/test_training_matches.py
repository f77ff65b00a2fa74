"""A real run of ten steps with every speed-up on follows stock TRL's: each logged loss, reward and length."""

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.training import logs_of, make_trainer, weights_of

CONFIG = {
    "max_steps": 10,
    "optim": "sgd",  # Adam divides gradients near zero by their own size, and rounding would look like a difference
    "learning_rate": 0.1,
    "max_completion_length": 16,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
}


def seldom(completions: list[str], **_) -> list[float]:
    """Often the same for a whole group, so that groups are dead; 0 or 1, which TRL's arithmetic tells from a live one."""
    return [float(text.count("a") > 2) for text in completions]


@pytest.mark.newest_trl
@pytest.mark.parametrize("loss", ["dapo", "bnpo"])
def test_ten_steps_follow_trls(tmp_path, loss):
    config = CONFIG | {"loss_type": loss, "reward_funcs": [seldom]}
    stock = make_trainer(tmp_path / "stock", **config)
    stock.train()
    ours = make_trainer(tmp_path / "ours", trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, **config)
    start = weights_of(ours)
    ours.train()
    live = [entry["packing/live_fraction"] for entry in logs_of(ours) if "packing/live_fraction" in entry]
    assert len(live) == 10
    assert min(live) < 1.0  # there was something to skip
    for mine, theirs in zip(logs_of(ours)[:-1], logs_of(stock)[:-1], strict=True):
        for key in theirs.keys() - {"entropy"}:
            # Which rows meet in a micro-batch differs, and with it the mean of its per-micro-batch ratios.
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    trained = weights_of(ours)
    for name, weight in weights_of(stock).items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    assert any((start[name] - weight).abs().max() > 1e-3 for name, weight in trained.items())


def test_adapters_follow_trls_through_scoring_checkpoints_and_a_resume(tmp_path):
    config = CONFIG | {
        "max_steps": 2,
        "beta": 0.1,
        "gradient_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "trainer_arguments": {"peft_config": LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")},
    }
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    stock = make_trainer(tmp_path / "stock", **config)
    stock.train()
    ours = make_trainer(tmp_path / "ours", **classes, **config)
    assert ours.speed.fuses_lora
    start = weights_of(ours)
    ours.train()
    layers = {name: module for name, module in ours.model.named_modules() if hasattr(module, "lora_A")}
    assert [name for name, module in layers.items() if "forward" in vars(module)] == []
    resumed = make_trainer(tmp_path / "resumed", **classes, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-1"))
    trained, again = weights_of(ours), weights_of(resumed)
    for name, weight in weights_of(stock).items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(again[name], trained[name], rtol=1e-5, atol=1e-7, msg=name)
    assert any((start[name] - weight).abs().max() > 1e-3 for name, weight in trained.items())
