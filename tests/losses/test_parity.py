"""TRL's eight losses against TRL: the real trainer's `_compute_loss`, its value, gradient and logged metrics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from trl import GRPOTrainer

from grpo_plus.losses import LOSSES, TRL_LOSSES, LossInputs, average, policy_loss
from tests.close import assert_close
from tests.training import make_trainer

# With an adapter the reference policy is the model without it; the tiny model has no name to load it again by.
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

ACCUMULATED, STEPS_PER_GENERATION = 3, 6

EXTRAS = [
    pytest.param({}, id="defaults"),
    pytest.param({"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.4}, id="delta"),
    pytest.param({"beta": 0.1, "use_bias_correction_kl": True}, id="beta-corrected"),
    pytest.param({"beta": 0.1, "use_bias_correction_kl": False}, id="beta-plain"),
]
HYPER_PARAMETERS = {
    "cispo": {"epsilon_high": 1.1},
    "sapo": {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.3},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.0},
}


def trainer_with(output_dir: Path, **config: Any) -> GRPOTrainer:
    adapter = {"peft_config": LORA} if config.get("beta") else {}
    batch = {"gradient_accumulation_steps": ACCUMULATED, "steps_per_generation": STEPS_PER_GENERATION}
    return make_trainer(output_dir, trainer_arguments=adapter, **batch, **config)


def step_inputs(rows: int, tokens: int, *, per_token: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What TRL hands to its loss: completions of 0 to T tokens, the second one masked altogether."""
    generator = torch.Generator().manual_seed(rows * 100 + tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[1] = 0
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    logps = -normal(rows, tokens).abs()
    return {
        "prompt_ids": torch.ones(rows, 2, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_ids": torch.ones(rows, tokens, dtype=torch.long),
        "completion_mask": mask,
        "advantages": normal(rows, tokens) if per_token else normal(rows),
        "logps": logps,
        "old_per_token_logps": logps + 0.3 * normal(rows, tokens),
        "ref_per_token_logps": logps + 0.2 * normal(rows, tokens),
        "num_items_in_batch": mask.sum() * 4,
    }


def trl_loss(trainer: GRPOTrainer, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    logps = inputs["logps"].clone().requires_grad_()
    # An injected input, not a mock: everything after the model's forward is TRL's own code, and only so does a
    # gradient with respect to the log-probabilities exist.
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
    trainer.current_gradient_accumulation_steps = ACCUMULATED
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert logps.grad is not None
    return loss.detach(), logps.grad


def our_loss(trainer: GRPOTrainer, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`policy_loss` with TRL's settings: how a configuration of TRL's maps onto ours."""
    args, training = trainer.args, trainer.model.training
    logps = inputs["logps"].clone().requires_grad_()
    old_logps = inputs.get("old_per_token_logps")
    advantages = inputs["advantages"]
    loss_inputs = LossInputs(
        logps,
        logps.detach() if old_logps is None else old_logps,
        advantages[:, None] if advantages.dim() == 1 else advantages,
        inputs["completion_mask"] * inputs.get("tool_mask", 1),
        inputs["ref_per_token_logps"],
        inputs.get("importance_sampling_ratio"),
    )
    entry = LOSSES[args.loss_type]
    keywords = {name: getattr(args, name) for name in entry.keywords}
    if args.loss_type == "cispo":
        keywords["epsilon_high"] = trainer.epsilon_high  # args.epsilon where unset
    window = ACCUMULATED / STEPS_PER_GENERATION if training else 1.0
    result = policy_loss(
        entry,
        loss_inputs,
        keywords,
        beta=args.beta,
        kl_ratio=args.importance_sampling_level if args.use_bias_correction_kl else None,
        num_items=inputs["num_items_in_batch"] * window,
        max_length=args.max_completion_length,
    )
    micro_batches = ACCUMULATED if training and entry.reduction != "global-token-mean" else 1
    loss = result.loss / micro_batches
    loss.backward()
    assert logps.grad is not None
    return loss.detach(), logps.grad, {k: average(v, loss_inputs.mask) for k, v in result.metrics.items()}


def assert_same(trainer: GRPOTrainer, inputs: dict[str, Any], rtol: float = 1e-10) -> None:
    expected, expected_gradient = trl_loss(trainer, inputs)
    loss, gradient, metrics = our_loss(trainer, inputs)
    assert expected_gradient.abs().max() > 0, "nothing to compare"
    assert_close("loss", loss, expected, rtol=rtol)
    assert_close("gradient", gradient, expected_gradient, rtol=rtol)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    names = set(logged) - {"entropy", "clip_ratio/low_min", "clip_ratio/high_max"}
    assert names == set(metrics)
    # TRL takes completions of a single token for one value per sequence, and counts the masked ones too.
    for name in names if inputs["logps"].shape[1] > 1 else ():
        assert float(metrics[name]) == pytest.approx(logged[name][-1], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_a_loss_is_trls(tmp_path, loss_type: str, level: str, extras: dict[str, Any]):
    config = {"loss_type": loss_type, "importance_sampling_level": level}
    trainer = trainer_with(tmp_path, **{**config, **extras, **HYPER_PARAMETERS.get(loss_type, {})})
    for training in (True, False):
        trainer.model.train(training)
        for rows, tokens in ((2, 1), (3, 7), (5, 4)):
            for per_token in (False, True):
                assert_same(trainer, step_inputs(rows, tokens, per_token=per_token))


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_a_loss_is_trls_right_after_generation(tmp_path, loss_type: str):
    # All ratios are exactly 1, where the clip's minimum is a tie.
    trainer = trainer_with(tmp_path, loss_type=loss_type)
    inputs = step_inputs(3, 5, per_token=False)
    del inputs["old_per_token_logps"]
    assert_same(trainer, inputs)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_a_loss_is_trls_in_float32_and_under_a_tool_mask(tmp_path, loss_type: str):
    trainer = trainer_with(tmp_path, loss_type=loss_type, beta=0.05)
    for per_token in (False, True):
        inputs = step_inputs(4, 9, per_token=per_token, dtype=torch.float32)
        inputs["tool_mask"] = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1]).repeat(4, 1)
        assert_same(trainer, inputs, rtol=1e-5)


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_a_loss_is_trls_under_the_samplers_ratio(tmp_path, loss_type: str, columns: int):
    trainer = trainer_with(tmp_path, loss_type=loss_type, beta=0.05)
    trainer.use_vllm = True
    inputs = step_inputs(3, 5, per_token=False)
    ratio = torch.tensor([[0.6, 1.4, 1.0, 0.0, 2.0], [1.0] * 5, [1.1, 0.9, 1.0, 1.3, 0.7]])[:, :columns]
    # TRL makes the ratio from masked differences, so where nothing counts it is 1.
    inputs["importance_sampling_ratio"] = ratio.where(inputs["completion_mask"][:, :columns].bool(), 1.0)
    assert_same(trainer, inputs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_where_trls_gradient_is_finite_ours_is_the_same(tmp_path, loss_type: str, level: str):
    # Ratios of e^±50 and e^±200; the latter is infinite in float32, where TRL's gradient becomes NaN.
    trainer = trainer_with(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    inputs = step_inputs(6, 4, per_token=False, dtype=torch.float32)
    inputs["completion_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["advantages"] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    inputs["old_per_token_logps"] = inputs["logps"] + torch.tensor([-50.0, -50.0, 50.0, 50.0, -200.0, 200.0])[:, None]
    _, expected = trl_loss(trainer, inputs)
    _, gradient, _ = our_loss(trainer, inputs)
    assert gradient.isfinite().all()
    finite = expected.isfinite()
    assert finite[:4].all()
    assert_close("gradient", gradient[finite], expected[finite], rtol=1e-5)
