"""The user's model, data and rewards, named by TRL's flags, as a task to compare estimators on."""

import functools
from dataclasses import asdict, dataclass, fields
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from grpo_plus.cli.arguments import load, loading, parse, reward_functions, shaping, split
from grpo_plus.compare.held_out import HeldOutTrainer
from grpo_plus.compare.task import Scores, Task
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.config.data import check_needs

TEST_SPLIT = "test"  # TRL's default of --dataset_test_split


@dataclass
class GivenFields(GRPOPlusConfig):
    """The fields as they were given: every arm makes a configuration of them, with changes."""

    def __post_init__(self) -> None:
        """Nothing is checked or filled in yet."""


def own_task(rest: list[str], num_held_out: int) -> Task:
    """The task that TRL's flags in `rest` describe.

    Args:
        num_held_out: rows to evaluate on, from the test split, or where there is none from the end of the training
            split, which is then trained without them.
    """
    own, script, model, mixture, given = parse("compare", rest, GivenFields, save_strategy="no")
    if own.eval_reward_funcs:
        raise ValueError(
            "compare judges the held-out rows by --reward_funcs, which its arms train on. Drop --eval_reward_funcs."
        )
    values = {entry.name: getattr(given, entry.name) for entry in fields(given) if entry.init}
    rewards = reward_functions(own, script).train
    check_needs(rewards)  # before a download
    dataset = load(script, mixture)
    train, held_out, described = _rows(dataset, script, num_held_out)
    shape = shaping(own, model, trust_remote_code=given.trust_remote_code)
    train, held_out = shape(train), shape(held_out)
    made: dict[str, Any] = {}

    def start() -> PreTrainedModel:
        config = GRPOPlusConfig(**values)
        trainer = HeldOutTrainer(**loading(model, config), reward_funcs=rewards, args=config, train_dataset=train)
        # A reward model is loaded once, too, and so is the tokenizer.
        made.update(
            reward_funcs=trainer.reward_funcs,
            reward_processing_classes=trainer.reward_processing_classes,
            processing_class=trainer.processing_class,
        )
        return trainer.accelerator.unwrap_model(trainer.model)

    def trainer(model: PreTrainedModel, config: GRPOPlusConfig) -> HeldOutTrainer:
        return HeldOutTrainer(model=model, args=config, train_dataset=train, **made)

    def evaluate(trainer: HeldOutTrainer) -> Scores:
        return trainer.held_out_scores(held_out)

    return Task(
        name=str(model.model_name_or_path),
        config=functools.partial(GRPOPlusConfig, **{**values, "model_init_kwargs": None}),
        start=start,
        trainer=trainer,
        evaluate=evaluate,
        samples=HeldOutTrainer.samples,
        facts=_facts(own, script, model, mixture)
        | {"loading": values["model_init_kwargs"], "held-out rows": described},
    )


def _rows(dataset: Any, script: Any, count: int) -> tuple[Any, Any, str]:
    """Rows to train on, rows to evaluate on, and where the latter are from."""
    train = split(dataset, script.dataset_train_split, "--dataset_train_split")
    if not isinstance(train, Dataset):
        raise ValueError(
            f"A comparison holds out rows by their number, but those of {type(train).__name__} have none. Load the "
            "dataset without streaming (--dataset_streaming)."
        )
    if script.dataset_test_split in dataset or script.dataset_test_split != TEST_SPLIT:
        test = split(dataset, script.dataset_test_split, "--dataset_test_split")
        count = min(count, len(test))
        return train, test.select(range(count)), f"the first {count} of {script.dataset_test_split!r}"
    if len(train) < 2 * count:
        raise ValueError(
            f"The dataset has no split {TEST_SPLIT!r}, and {count} of the {len(train)} rows of "
            f"{script.dataset_train_split!r} are too many to be held out. Set --num_held_out or --dataset_test_split."
        )
    kept = len(train) - count
    described = f"the last {count} of {script.dataset_train_split!r}, which are not trained on"
    return train.select(range(kept)), train.select(range(kept, len(train))), described


def _facts(own: Any, script: Any, model: Any, mixture: Any) -> dict[str, Any]:
    return {"script": asdict(script) | asdict(own), "model": asdict(model), "mixture": asdict(mixture)}
