"""Tools and environments: what TRL trains with them, GRPOPlusTrainer trains, its speed-ups on."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model
from tests.calling import Counting, Growing, asking, called, calling_tokenizer, count, grow
from tests.training import logs_of, make_trainer, weights_of

TOKENIZER = calling_tokenizer()
PROMPTS = asking("012", "3", "12", "0")


async def lengths(completions: list[Any], environments: list[Any], **_: Any) -> list[float | None]:
    """Judges what the environment does not judge itself."""
    return [
        None if isinstance(environment, Counting) else float(len(messages))
        for messages, environment in zip(completions, environments, strict=True)
    ]


CASES: dict[str, dict[str, Any]] = {
    "tools that fail or answer at length": {
        "tools": [count, grow],
        "mask_truncated_completions": True,
        "num_iterations": 2,
    },
    "adapters": {"tools": [count], "peft_config": LoraConfig(r=4, target_modules="all-linear"), "beta": 0.1},
    "an environment that owns data and reward": {
        "environment_factory": Counting,
        "train_dataset": None,
        "reward_funcs": [],
    },
    "several environments": {
        "environment_factory": {"one": Counting, "two": Growing},
        "train_dataset": PROMPTS.add_column("environment", ["one", "two"] * 2),
        "reward_funcs": [lengths],
        "tools": [grow],
    },
    "prompts of the environment": {
        "environment_factory": {"one": Counting},
        "train_dataset": Dataset.from_dict({"environment": ["one"] * 4, "level": [0, 1, 2, 3]}),
        "max_tool_calling_iterations": 1,
    },
}  # fmt: skip
OF_THE_TRAINER = ("tools", "environment_factory", "peft_config")


def trained(output_dir: Any, case: dict[str, Any], **settings: Any) -> GRPOTrainer:
    Counting.made = 0
    rest = {"reward_funcs": [called], "train_dataset": PROMPTS} | case
    arguments = {name: rest.pop(name) for name in OF_THE_TRAINER if name in rest}
    trainer = make_trainer(
        output_dir,
        model=tiny_model(TOKENIZER, hidden_size=16, num_heads=2),
        processing_class=TOKENIZER,
        trainer_arguments=arguments,
        max_completion_length=16,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        **rest | settings,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_two_steps_are_trls(tmp_path, case):
    stock = trained(tmp_path / "stock", CASES[case])
    ours = trained(tmp_path / "ours", CASES[case], trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig)
    theirs, mine = logs_of(stock), logs_of(ours)
    assert theirs[0]["tools/call_frequency"] > 0
    for entry, expected in zip(mine, theirs, strict=True):
        expected.pop("entropy", None)  # that of skipped rows is an estimate
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    for name, weight in weights_of(stock).items():
        torch.testing.assert_close(weights_of(ours)[name], weight, rtol=1e-5, atol=1e-6, msg=name)
