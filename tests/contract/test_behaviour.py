"""What the seam assumes of TRL's behaviour, shown on TRL itself."""

import pytest
import torch
from trl import GRPOConfig

from grpo_plus.losses import TRL_LOSSES
from grpo_plus.trainer.names import GENERATES, PREPARES
from tests.training import make_trainer


def test_rewards_are_blocks_of_num_generations_rows(tmp_path):
    seen = []

    def record(prompts, **_):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    make_trainer(tmp_path, max_steps=1, reward_funcs=[record]).train()
    assert [len(set(seen[start : start + 4])) for start in range(0, 8, 4)] == [1, 1]


def test_trl_knows_every_loss(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    compute, losses = trainer._compute_loss, {}

    def of_every_name(model, inputs):
        for trainer.loss_type in TRL_LOSSES:
            losses[trainer.loss_type] = compute(model, inputs)
        return losses["dapo"]

    trainer._compute_loss = of_every_name
    trainer.train()
    assert list(losses) == list(TRL_LOSSES)
    assert [name for name, loss in losses.items() if not loss.isfinite()] == []


def test_trl_refuses_an_unknown_loss_only_in_training(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="unheard_of")
    with pytest.raises(ValueError, match="Unknown loss type: unheard_of"):
        trainer.train()


def test_the_defaults_that_an_estimator_excludes():
    config = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    assert (config.scale_rewards, config.multi_objective_aggregation) == ("group", "sum_then_normalize")


def test_completions_are_generated_once_within_their_preparation(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    calls = []

    def recorded(name):
        method = getattr(trainer, name)

        def call(*args, **kwargs):
            calls.append(f"{name} begins")
            result = method(*args, **kwargs)
            calls.append(f"{name} ends")
            return result

        setattr(trainer, name, call)

    for name in (GENERATES, PREPARES):
        recorded(name)
    trainer.train()
    assert calls == [f"{PREPARES} begins", f"{GENERATES} begins", f"{GENERATES} ends", f"{PREPARES} ends"] * 2


def test_the_attributes_that_the_seam_reads_are_there(tmp_path):
    trainer = make_trainer(tmp_path, reward_weights=[1.0, 2.0], num_generations_eval=2)
    assert (trainer.num_generations, trainer.num_generations_eval) == (4, 2)
    assert trainer.reward_weights.tolist() == [1.0, 2.0]
    assert trainer.reward_func_names == ["vowels", "brevity"]
    assert list(trainer._logs["advantages"]) == []
    assert trainer._logs["prompt"].maxlen == trainer.args.generation_batch_size
    assert (trainer.aux_loss_enabled, trainer.router_aux_loss_coef) == (False, 0.0)
    trainer._log_completion_extra("step_ends", [[1], [2]])
    assert trainer._pending_extra_logs == {"step_ends": [[1], [2]]}


def test_a_masked_token_has_log_probability_zero(tmp_path):
    trainer = make_trainer(tmp_path)
    ids, mask = torch.full((2, 5), 7), torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)
    assert (logps == 0).tolist() == [[False, False, False], [False, True, True]]
