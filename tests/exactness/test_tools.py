"""Tools and environments: what TRL trains with them, GRPOPlusTrainer trains, its speed-ups on."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model
from tests.calling import Counting, Growing, asking, called, calling_tokenizer, count, grow
from tests.training import logs_of, make_trainer, newest, weights_of

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
# The minors differ in whose tools a completion is read with.
ON_BOTH_MINORS = ("tools that fail or answer at length", "several environments")
OF_THE_TRAINER = ("tools", "environment_factory", "peft_config", "reward_processing_classes")
OURS: dict[str, Any] = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}


def trained(output_dir: Any, case: dict[str, Any], **settings: Any) -> GRPOTrainer:
    Counting.made = 0
    generate = settings.pop("generate", None)
    rest = {"reward_funcs": [called], "train_dataset": PROMPTS} | case
    arguments = {name: rest.pop(name) for name in OF_THE_TRAINER if name in rest}
    trainer = make_trainer(
        output_dir,
        model=tiny_model(TOKENIZER, hidden_size=16, num_heads=2),
        processing_class=TOKENIZER,
        trainer_arguments=arguments,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        **{"max_completion_length": 16} | rest | settings,
    )
    if generate is not None:
        trainer.model.generate = generate
    trainer.train()
    return trainer


def trained_alike(ours: GRPOTrainer, stock: GRPOTrainer) -> None:
    for entry, expected in zip(logs_of(ours), logs_of(stock), strict=True):
        expected.pop("entropy", None)  # that of skipped rows is an estimate
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    for name, weight in weights_of(stock).items():
        torch.testing.assert_close(weights_of(ours)[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", [case if case in ON_BOTH_MINORS else newest(case) for case in CASES])
def test_two_steps_are_trls(tmp_path, case):
    stock = trained(tmp_path / "stock", CASES[case])
    trained_alike(trained(tmp_path / "ours", CASES[case], **OURS), stock)
    assert logs_of(stock)[0]["tools/call_frequency"] > 0


def scripted(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    """Two calls, of which one fails, and two answers; then an answer to each call."""
    first = ["<count>12</call><eos>", "<grow><user></call><eos>", "3<eos>", "0123"]
    texts = first if len(input_ids) == len(first) else ["1<eos>", "22<eos>"]
    written = TOKENIZER(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    return torch.cat([input_ids, written], dim=1)


@pytest.mark.newest_trl
def test_a_model_with_a_generate_of_its_own_and_a_reward_model_are_trls(tmp_path):
    config = tiny_model(TOKENIZER, hidden_size=16, num_heads=2).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        judge = AutoModelForSequenceClassification.from_config(config)
    case = {"tools": [count, grow], "reward_funcs": [judge], "reward_processing_classes": [TOKENIZER]}
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 64, "generate": scripted}
    stock = trained(tmp_path / "stock", case, **settings)
    ours = trained(tmp_path / "ours", case, **settings, **OURS)
    trained_alike(ours, stock)
    start = tiny_model(TOKENIZER, hidden_size=16, num_heads=2).state_dict()
    assert logs_of(ours)[0]["tools/call_frequency"] == logs_of(ours)[0]["tools/failure_frequency"] == 0.5
    assert [name for name, weight in weights_of(ours).items() if torch.equal(weight, start[name])] == []
