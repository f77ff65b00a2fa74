"""docs/log.md explains every number that a run logs, and no number that does not exist."""

import re
from inspect import getsource
from pathlib import Path

import pytest
import torch
import transformers.trainer_utils
from transformers import Trainer
from trl.trainer import grpo_trainer

import grpo_plus
from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses import LOSSES, LossInputs, policy_loss
from grpo_plus.trainer.profile import StepProfile
from tests.training import PROMPTS, make_trainer

PAGE = Path(__file__).parents[1] / "docs" / "log.md"
EXPLAINED = {
    key
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
    for key in re.findall(r"`([^`]+)`", line.split("|")[1])
}
# What stands for a name of the user's on the page.
NAMES = {"vowels": "NAME", "brevity": "NAME", "total": "NAME"} | {str(number): "TASK" for number in range(8)}


def written(key: str) -> str:
    """The key as the page writes it."""
    key = re.sub(r"@\d+$", "@K", key.removeprefix("eval_"))
    return "/".join(NAMES.get(part, part) for part in key.split("/"))


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    """What a run with nearly everything on logs."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("run"),
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        advantage_estimator="ema_task",
        advantage_modifiers={"clip": {"max": 1.0}},
        task_column="answer",
        reward_weight_schedule={"vowels": [1.0, 0.5]},
        max_refills=1,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_pass_at_k=[2],
        eval_pass_reward="vowels",
        per_device_eval_batch_size=4,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(1))},
    )
    trainer.add_callback(StepProfile(trainer))
    trainer.train()
    return {written(key) for entry in trainer.state.log_history for key in entry}


def of_the_losses() -> set[str]:
    two = torch.tensor([[-1.0, -2.0], [-0.5, -1.0]])
    inputs = LossInputs(two, two, torch.tensor([[1.0], [-1.0]]), torch.ones(2, 2), two)
    return {name for loss in LOSSES for name in policy_loss(loss, inputs, num_items=4.0, max_length=2).metrics}


def of_trl() -> set[str]:
    """The names under which TRL's trainer logs a number."""
    return set(re.findall(r'_metrics\[(?:mode|"train")\]\["([^"]+)"\]', getsource(grpo_trainer)))


def test_every_number_of_a_run_is_explained(logged):
    assert len(logged) > 55
    assert logged - EXPLAINED == set()


def test_every_number_of_a_loss_and_of_trl_is_explained():
    losses, trl = of_the_losses(), of_trl()
    assert len(losses) > 6
    assert len(trl) > 30
    assert (losses | trl) - EXPLAINED == set()


def test_every_number_on_the_page_exists(logged):
    code = [path.read_text(encoding="utf-8") for path in Path(grpo_plus.__file__).parent.rglob("*.py")]
    text = "\n".join([*code, getsource(Trainer), getsource(transformers.trainer_utils)])
    known = logged | of_the_losses() | of_trl()
    unseen = {key: key.removeprefix("advantages/") for key in EXPLAINED - known}
    assert [key for key, literal in unseen.items() if f'"{literal}"' not in text] == []
