"""The path of losses that TRL lacks, held to TRL's: its own formulas, registered under other names, train alike."""

import math

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses import LOSSES, register
from tests.close import differing
from tests.training import PROMPTS, logs_of, make_trainer, newest, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def twin():
    """TRL's loss of that name under another, so that it takes our path."""

    def make(name: str) -> str:
        loss = LOSSES[name]
        register(f"our_{name}", reduction=loss.reduction)(loss.function)
        return f"our_{name}"

    with LOSSES.temporarily():
        yield make


CASES = [
    newest("grpo", {"gradient_accumulation_steps": 2}, None, id="grpo-accumulation"),
    newest("bnpo", {"num_iterations": 2}, None, id="bnpo-2iterations"),
    newest("dapo", {"gradient_accumulation_steps": 2, "steps_per_generation": 4}, None, id="dapo-4steps"),
    newest("dr_grpo", {"num_iterations": 2, "mask_truncated_completions": True}, None, id="dr_grpo-truncated"),
    pytest.param("luspo", {"beta": 0.2, "num_iterations": 2}, LORA, id="luspo-lora-kl"),
    newest("grpo", {"beta": 0.2, "use_bias_correction_kl": False, "num_iterations": 2}, LORA, id="grpo-plain-kl"),
    newest("sapo", {"num_iterations": 2}, None, id="sapo-2iterations"),
]


@pytest.mark.parametrize(("loss", "config", "peft_config"), CASES)
def test_three_steps_follow_trls(tmp_path, twin, loss, config, peft_config):
    arguments = {"peft_config": peft_config}
    # Plain SGD: Adam divides near-zero gradients by their own size, and rounding would look like a difference.
    common = {"optim": "sgd", "learning_rate": 0.5, "max_completion_length": 16, "trainer_arguments": arguments}
    stock = make_trainer(tmp_path / "stock", loss_type=loss, **common, **config)
    stock.train()
    ours = make_trainer(
        tmp_path / "ours",
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        loss_type=twin(loss),
        **common,
        **config,
    )
    start = weights_of(ours)
    ours.train()
    trained = weights_of(ours)
    for name, weight in weights_of(stock).items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert any((start[name] - weight).abs().max() > 1e-4 for name, weight in trained.items()), "nothing was trained"
    # TRL takes the mean of its micro-batches' means, we that of the step's tokens.
    rel = 1e-3 if config.get("gradient_accumulation_steps", 1) == 1 else 0.03
    for mine, theirs in zip(logs_of(ours), logs_of(stock), strict=True):
        shared = mine.keys() & theirs.keys()
        assert {"loss", "grad_norm", "entropy"} <= shared or "train_loss" in shared
        assert {key: mine[key] for key in shared} == pytest.approx(
            {key: theirs[key] for key in shared}, rel=rel, abs=1e-6
        )
        assert theirs.keys() - mine.keys() <= {"clip_ratio/low_min", "clip_ratio/high_max"}


class FromTools:
    """What TRL's dictionary holds with vLLM and with tools, put in by hand; and advantages that do not sum to zero."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows, tokens = output["completion_ids"].shape
        numbers = torch.arange(rows * tokens).view(rows, tokens)
        output["advantages"] = 0.5 + torch.arange(rows).float()
        output["tool_mask"] = (numbers % 3 > 0).int()
        output["importance_sampling_ratio"] = 0.5 + (numbers % 7) / 4
        return output

    def _compute_loss(self, model, inputs):
        self.use_vllm = True  # TRL multiplies by the sampler's ratio under vLLM only
        loss = super()._compute_loss(model, inputs)
        self.use_vllm = False
        return loss


class StockWithTools(FromTools, GRPOTrainer):
    pass


class OursWithTools(FromTools, GRPOPlusTrainer):
    pass


@pytest.mark.newest_trl
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_tools_a_sampler_and_evaluation_follow_trls(tmp_path, twin, loss):
    # Two optimizer steps of two micro-batches per generation: in evaluation neither of the two may count.
    common = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_completion_length": 16,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
        "trainer_arguments": {"eval_dataset": PROMPTS.select(range(2))},
    }
    stock = make_trainer(tmp_path / "stock", trainer_class=StockWithTools, loss_type=loss, **common)
    stock.train()
    ours = make_trainer(
        tmp_path / "ours",
        trainer_class=OursWithTools,
        config_class=GRPOPlusConfig,
        loss_type=twin(loss),
        **common,
    )
    ours.train()
    mine, theirs = ([entry[key] for entry in logs_of(trainer) for key in ("loss", "eval_loss") if key in entry]
                    for trainer in (ours, stock))  # fmt: skip
    assert len(mine) == 4
    assert mine == pytest.approx(theirs, rel=1e-4)
    for name, weight in weights_of(stock).items():
        torch.testing.assert_close(weights_of(ours)[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.newest_trl
@pytest.mark.parametrize("loss", [name for name in LOSSES if LOSSES[name].origin == "grpo_plus"])
def test_every_loss_that_trl_lacks_trains(tmp_path, loss):
    trainer = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        loss_type=loss,
        advantage_estimator="rloo",
        num_iterations=2,
        log_completions=True,
        trainer_arguments={"eval_dataset": None},
    )
    start = weights_of(trainer)
    trainer.train()
    assert differing(weights_of(trainer), start)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss for loss in losses if not math.isfinite(loss)] == []
