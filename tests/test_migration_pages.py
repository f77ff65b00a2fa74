"""The pages for people who come from elsewhere name what exists, and their replacements train the same."""

import re
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from peft import LoraConfig
from torch.testing import assert_close
from trl import GRPOConfig, RLOOConfig, RLOOTrainer, experimental
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.config.plain import OFF
from tests.training import make_trainer, weights_of

DOCS = Path(__file__).parents[1] / "docs"
FROM_TRL, EXPERIMENTAL, FROM_UNSLOTH = (
    (DOCS / name).read_text(encoding="utf-8") for name in ("from_trl.md", "from_trl_experimental.md", "from_unsloth.md")
)
TRLS = {field.name for field in fields(GRPOConfig)}


def test_every_new_field_is_on_the_page():
    table = FROM_TRL.split("## New fields")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE))))
    assert named - {"loss_type"} == {field.name for field in fields(GRPOPlusConfig)} - TRLS


def test_the_block_that_turns_everything_off_is_complete():
    block = yaml.safe_load(re.search(r"```yaml\n(.*?)```", FROM_TRL, re.DOTALL)[1])
    defaults = {field.name: field.default for field in fields(GRPOPlusConfig)}
    assert block == {name: off for name, off in OFF.items() if off != {} and off != defaults[name]}


def test_fields_on_the_page_for_people_from_unsloth_exist():
    ours = [line.split("|")[2] for line in FROM_UNSLOTH.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"\b(\w+)=(?!LoraConfig)", " ".join(ours)))
    arguments_of_functions = {"model", "quantization_config", "peft_config", "r", "alpha", "target_modules", "method"}
    assert len(named) > 10
    assert named - arguments_of_functions <= {field.name for field in fields(GRPOPlusConfig)}


def test_trainers_that_are_said_to_be_removed_are_not_there_and_the_others_are():
    removed, still = EXPERIMENTAL.split("## Still there")
    there = {path.name for path in Path(experimental.__file__).parent.iterdir()}
    gone = set(re.findall(r"^\| `(\w+)\.", removed, re.MULTILINE))
    assert len(gone) == 8
    assert gone & there == set()
    assert set(re.findall(r"`(\w+)\.\w+Trainer`", still)) - {"trl"} <= there


def test_gmpo_trains_to_the_weights_of_trls_trainer(tmp_path):
    settings = {"max_steps": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    theirs = make_trainer(tmp_path, trainer_class=GMPOTrainer, config_class=GMPOConfig, epsilon=0.01, **settings)
    theirs.train()  # before the other trainer is made, which seeds the generator anew
    ours = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        loss_type="gmpo",
        loss_kwargs={"epsilon": 0.01},
        **settings,
    )
    ours.train()
    assert max(entry.get("clip_ratio/high_mean", 0.0) for entry in ours.state.log_history) > 0
    for name, weight in weights_of(theirs).items():
        assert_close(weights_of(ours)[name], weight, rtol=1e-3, atol=1e-4)


def test_rloo_trains_to_the_weights_of_trls_trainer(tmp_path):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.5, "beta": 0.5}
    adapter = {
        "trainer_arguments": {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    }  # its base is the reference
    theirs = make_trainer(tmp_path, trainer_class=RLOOTrainer, config_class=RLOOConfig, **settings, **adapter)
    start = weights_of(theirs)
    theirs.train()
    rloo = {"advantage_estimator": "rloo", "loss_type": "kl_to_old", "loss_kwargs": {"beta_old": 0.0}}
    assert str(rloo).replace("'", '"') in EXPERIMENTAL
    rloo["advantage_modifiers"] = {"kl_in_reward": {}}
    plus = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    ours = make_trainer(tmp_path, **plus, **rloo, **settings, **adapter)
    ours.train()
    trained = {name: weight for name, weight in weights_of(theirs).items() if "lora_B" in name}
    for name, weight in trained.items():
        assert_close(weights_of(ours)[name], weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(weight, start[name])
