"""What the configuration says about a loss that TRL lacks reaches that loss."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses import LossInputs, policy_loss
from tests.losses.cases import MASK, NEW, OLD, PER_ROW, REF, double
from tests.training import make_trainer

INPUTS = LossInputs(double(NEW), double(OLD), double(PER_ROW), double(MASK), double(REF))
BASE: dict[str, Any] = {"loss_type": "dual_clip", "loss_kwargs": {"c": 1.05}, "beta": 0.1, "max_completion_length": 4}


def through_the_trainer(tmp_path, accumulation_steps: int = 1, **settings: Any) -> float:
    arguments = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}  # the reference of the KL is the base
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    trainer = make_trainer(tmp_path, num_iterations=2, trainer_arguments=arguments, **classes, **settings)
    return trainer.policy_loss(INPUTS, num_items=torch.tensor(5.0), accumulation_steps=accumulation_steps).loss.item()


def by_itself(loss: str = "dual_clip", c: float = 1.05, **options: Any) -> float:
    options = {"beta": 0.1, "kl_estimator": "k3", "kl_ratio": "token", "num_items": 5.0, "max_length": 4} | options
    return policy_loss(loss, INPUTS, {"c": c} if loss == "dual_clip" else {}, **options).loss.item()


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"loss_kwargs": {"c": 1.2}}, {"c": 1.2}),
        ({"loss_type": "gmpo", "loss_kwargs": None}, {"loss": "gmpo"}),
        ({"loss_reduction": "seq-mean-token-sum-norm"}, {"loss_reduction": "seq-mean-token-sum-norm"}),
        ({"kl_estimator": "k1"}, {"kl_estimator": "k1"}),
        ({"use_bias_correction_kl": False}, {"kl_ratio": None}),
        ({"beta": 0.3}, {"beta": 0.3}),
        (
            {"loss_reduction": "token-mean", "accumulation_steps": 2},
            {"loss_reduction": "token-mean", "accumulation_steps": 2},
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_each_setting_reaches_the_loss(tmp_path, settings, options):
    expected = by_itself(**options)
    assert abs(expected - by_itself()) > 1e-4, "the setting makes no difference here"
    assert through_the_trainer(tmp_path, **(BASE | settings)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate=0 trains nothing"),
        (
            {"advantage_estimator": "grpo", "advantage_modifiers": {"kl_in_reward": {}}, "beta": 0.1},
            "differs in the KL alone",
        ),
    ],
)
def test_a_warning_names_the_line_that_makes_the_configuration(tmp_path, settings, message):
    with pytest.warns(UserWarning, match=message) as warned:
        GRPOPlusConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert [warning.filename for warning in warned if "FutureWarning" not in str(warning.category)] == [__file__]
