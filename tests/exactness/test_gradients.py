"""Loss, gradients and logged metrics with the speed-ups on, against stock TRL on the same micro-batch."""

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses import LOSSES
from grpo_plus.packing import recomputed, tree
from tests.close import assert_close
from tests.training import make_trainer, newest

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
DEAD = (1, 4, 5)  # rows with zero advantage
PASS = 13  # tokens of a pass: a padded row, or a part of the largest group

# Every loss of TRL's meets every form, with and without what else changes a step. TRL's formulas are the same in both
# of its minors, and its log-probabilities and entropies are not: the older one meets a case of each kind.
CASES = [
    newest("grpo", "shared_prompt", {}, None),
    ("dapo", "shared_prompt", {"gradient_checkpointing": True}, None),
    newest("bnpo", "shared_prompt", {}, LORA),
    ("dr_grpo", "padding_free", {}, LORA),
    newest("luspo", "shared_prompt", {"importance_sampling_level": "sequence"}, None),
    newest("cispo", "padding_free", {"epsilon_high": 1.1}, None),
    newest("sapo", "none", {}, None),
    newest("vespo", "shared_prompt", {"gradient_checkpointing": True}, LORA),
    newest("grpo", "padding_free", {"importance_sampling_level": "sequence", "gradient_checkpointing": True}, LORA),
    newest("dapo", "none", {"delta": 1.5}, LORA),
    newest("dapo", "shared_prompt", {"beta": 0.1}, LORA),
    newest("sapo", "shared_prompt", {"off_policy_mask_threshold": 0.1}, None),
    ("grpo", "shared_prompt", {"top_entropy_quantile": 0.5}, None),
    newest("dapo", "padding_free", {"entropy_coef": 0.1}, None),
    newest("gmpo", "shared_prompt", {}, None),
    newest("kl_to_old", "padding_free", {}, None),
    newest(
        "clip_cov",
        "shared_prompt",
        {"loss_kwargs": {"clip_cov_ratio": 0.3, "clip_cov_lb": -9.0, "clip_cov_ub": 9.0}},
        None,
    ),
    newest("topr", "shared_prompt", {}, LORA),
]


def trainer(output_dir, loss, config, adapter, **ours) -> GRPOTrainer:
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    made = make_trainer(
        output_dir,
        loss_type=loss,
        trainer_arguments={"peft_config": adapter},
        **(classes if ours or LOSSES[loss].origin == "grpo_plus" else {}),
        **ours,
        **config,
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 2
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return made


def micro_batch(*, per_token: bool = False, on_policy: bool = False) -> dict[str, torch.Tensor]:
    """Eight rows as TRL hands them over: three prompts, completions of 0 and 1 tokens, some with zero advantage."""
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, 20, (length,), generator=generator) for length in (5, 3, 5)]
    rows = [prompts[which] for which in (0, 1, 0, 2, 1, 0, 2, 0)]
    lengths = torch.tensor([7, 3, 0, 1, 7, 4, 2, 5])
    prompt_ids, prompt_mask = torch.zeros(8, 5, dtype=torch.long), torch.zeros(8, 5, dtype=torch.long)
    for row, prompt in enumerate(rows):
        prompt_ids[row, 5 - len(prompt) :], prompt_mask[row, 5 - len(prompt) :] = prompt, 1
    mask = (torch.arange(7) < lengths[:, None]).long()
    advantages = torch.randn(8, 7, generator=generator) if per_token else torch.randn(8, generator=generator)
    if per_token:
        advantages[:, 0] = 0.0  # such a row is live all the same
    advantages[list(DEAD)] = 0.0
    tool_mask = (torch.rand(8, 7, generator=generator) > 0.2).long()
    off_policy = {
        "old_per_token_logps": (-3.0 + 0.3 * torch.randn(8, 7, generator=generator)) * mask,
        "ref_per_token_logps": (-3.0 + 0.3 * torch.randn(8, 7, generator=generator)) * mask,
    }
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, 20, (8, 7), generator=generator) * mask,
        "completion_mask": mask,
        "tool_mask": tool_mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum() * 2,
    } | ({} if on_policy else off_policy)


def step(made: GRPOTrainer, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    made.model.zero_grad()
    torch.manual_seed(0)  # clip_cov draws tokens
    loss = made._compute_loss(made.model, inputs)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in made.model.named_parameters() if p.requires_grad}


def assert_same_step(stock, ours, inputs):
    expected, actual = step(stock, inputs), step(ours, inputs)
    assert_close("loss", actual[0], expected[0], rtol=2e-6)
    assert actual[1].keys() == expected[1].keys()
    assert [name for name, gradient in actual[1].items() if gradient is None] == []
    flat = [
        torch.cat([gradient.flatten() for gradient in gradients.values()]) for gradients in (actual[1], expected[1])
    ]
    assert flat[1].norm() > 0
    assert_close("gradients", *flat, rtol=2e-6)


@pytest.mark.newest_trl
@pytest.mark.parametrize("packing", ["shared_prompt", "padding_free"])
def test_a_step_through_flash_attention_is_trls(tmp_path, monkeypatch, packing):
    # Plain torch stands for the kernels here.
    monkeypatch.setattr("grpo_plus.packing.cascade.why_not_flash", lambda device, dtype: None)
    stock = trainer(tmp_path / "stock", "grpo", {}, LORA)
    ours = trainer(tmp_path / "ours", "grpo", {"gradient_checkpointing": True}, LORA, packing=packing)
    assert_same_step(stock, ours, micro_batch())
    assert "cascade" in ours.speed.packer.describe() or "flash" in ours.speed.packer.describe()


@pytest.mark.parametrize(("loss", "packing", "config", "adapter"), CASES)
def test_a_step_is_trls(tmp_path, monkeypatch, loss, packing, config, adapter):
    off = {"packing": "none", "skip_zero_advantage": False} if LOSSES[loss].origin == "grpo_plus" else {}
    stock = trainer(tmp_path / "stock", loss, config, adapter, **off)
    ours = trainer(tmp_path / "ours", loss, config, adapter, packing=packing)
    assert_same_step(stock, ours, micro_batch())
    for name, values in stock._metrics["train"].items():
        # Skipped rows count with the others' mean entropy, and with a ratio of 1 in VESPO's weight.
        imputed = ours.speed.skips and name in ("entropy", "vespo/phi_seq_mean")
        tolerance = {"entropy": 0.05, "vespo/phi_seq_mean": 10.0}[name] if imputed else 1e-5
        assert ours._metrics["train"][name] == pytest.approx(values, rel=tolerance, nan_ok=True), name
    live = ours._metrics["train"].get("packing/live_fraction")
    assert live == ([5 / 8] if ours.speed.skips else [1.0])
    again = []
    monkeypatch.setattr(recomputed, "_called", lambda place, part: again.append(part) or part())
    ours.speed.passes.tokens = PASS
    assert_same_step(stock, ours, micro_batch())
    assert len(again) >= 2  # a pass that is computed twice


@pytest.mark.newest_trl
@pytest.mark.parametrize(("flash", "adapter"), [(False, None), (True, LORA)], ids=["full", "flash-lora"])
def test_a_step_over_rows_that_begin_alike_is_trls(tmp_path, monkeypatch, flash, adapter):
    if flash:
        monkeypatch.setattr("grpo_plus.packing.cascade.why_not_flash", lambda device, dtype: None)
    monkeypatch.setattr(tree, "LEAST_SAVED", 1)
    inputs = micro_batch()
    ids = inputs["completion_ids"]
    ids[7, :5], ids[6, :1] = ids[0, :5], ids[3, :1]  # each of the other's prompt, and all live
    stock = trainer(tmp_path / "stock", "dapo", {}, adapter)
    ours = trainer(tmp_path / "ours", "dapo", {"gradient_checkpointing": True}, adapter, packing="shared_prompt")
    assert_same_step(stock, ours, inputs)
    # Prompts of 4 tokens without the last. Completions of 7 and 5 tokens share 5, those of 1 and 2 tokens share 1.
    assert ours._metrics["train"]["packing/token_ratio"] == [8 * 12 / (4 + 7 + 4 + 2)]


@pytest.mark.newest_trl
@pytest.mark.parametrize("per_token", [False, True], ids=["per-row", "per-token"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_advantages_of_every_shape(tmp_path, per_token, on_policy):
    inputs = micro_batch(per_token=per_token, on_policy=on_policy)
    assert_same_step(
        trainer(tmp_path / "s", "dapo", {}, None), trainer(tmp_path / "o", "dapo", {}, None, packing="auto"), inputs
    )


@pytest.mark.newest_trl
def test_a_micro_batch_without_advantages_has_gradients_of_zero(tmp_path):
    inputs = micro_batch() | {"advantages": torch.zeros(8)}
    ours = trainer(tmp_path, "dapo", {}, None, packing="auto")
    loss, gradients = step(ours, inputs)
    assert loss == 0
    assert [name for name, gradient in gradients.items() if gradient is None or gradient.any()] == []
    assert ours._metrics["train"]["packing/live_fraction"] == [1 / 8]
    # The shortest row that has something to score, of 5 + 1 tokens; the last one predicts nothing.
    assert ours._metrics["train"]["packing/token_ratio"] == [8 * 12 / 5]


@pytest.mark.newest_trl
def test_a_micro_batch_of_masked_completions_has_gradients_of_zero(tmp_path):
    # As mask_truncated_completions leaves it where every completion was cut.
    inputs = micro_batch(on_policy=True)
    inputs |= {"completion_mask": torch.zeros_like(inputs["completion_mask"])}
    _, gradients = step(trainer(tmp_path, "dapo", {}, None, packing="auto"), inputs)
    assert [name for name, gradient in gradients.items() if gradient is None or gradient.any()] == []


@pytest.mark.newest_trl
def test_a_skipped_row_cannot_overflow(tmp_path):
    # A ratio of exp(0 - old) would be infinite, and infinity times an advantage of 0 is NaN.
    inputs = micro_batch()
    inputs["old_per_token_logps"][list(DEAD)] = -200.0 * inputs["completion_mask"][list(DEAD)]
    loss, gradients = step(trainer(tmp_path, "grpo", {}, None, packing="auto"), inputs)
    assert loss.isfinite()
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []


def test_evaluation_forwards_every_row(tmp_path):
    stock, ours = trainer(tmp_path / "s", "dapo", {}, None), trainer(tmp_path / "o", "dapo", {}, None, packing="auto")
    for made in (stock, ours):
        made.model.eval()
    with torch.no_grad():
        expected, actual = (made._compute_loss(made.model, micro_batch()) for made in (stock, ours))
    assert_close("loss", actual, expected, rtol=2e-6)
    assert ours._metrics["eval"]["entropy"] == pytest.approx(stock._metrics["eval"]["entropy"], rel=1e-5)
    assert "packing/token_ratio" not in ours._metrics["train"]
