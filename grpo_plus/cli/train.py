"""`grpo-plus train`: `trl grpo` with GRPOPlusTrainer. Every flag of TRL's and `--config file.yaml`, parsed by TRL."""

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from grpo_plus.cli.arguments import load, loading, parse, reward_functions, shaping, split
from grpo_plus.cli.own_arguments import OwnArguments

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig
    from trl.scripts.grpo import GRPOScriptArguments

    from grpo_plus import GRPOPlusTrainer
    from grpo_plus.config import GRPOPlusConfig

HELP = "Train a model: every flag of `trl grpo`, a --config file, and ours."
EXAMPLE = "grpo-plus train --config run.yaml --output_dir out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own: TRL's parser reads them."""


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Parse `rest` and train."""
    import warnings

    from accelerate import PartialState

    from grpo_plus.config import GRPOPlusConfig

    with warnings.catch_warnings():
        # Transformers deprecates fields that TRL itself sets; nothing that the user could change.
        warnings.simplefilter("ignore", FutureWarning)
        train(*parse("train", rest, GRPOPlusConfig))
    # After the trainer is gone: a DDP model that outlives its process group waits for it forever under gloo.
    PartialState().destroy_process_group()
    return 0


def train(
    own: OwnArguments,
    script: "GRPOScriptArguments",
    model: "ModelConfig",
    mixture: "DatasetMixtureConfig",
    config: "GRPOPlusConfig",
) -> None:
    """Load what the arguments name, train, save, and push if asked to."""
    from grpo_plus import GRPOPlusTrainer, StepProfile
    from grpo_plus.config.data import check_needs

    _check_evaluates(own, config)
    rewards = reward_functions(own, script)
    check_needs([*rewards.train, *rewards.evaluation])  # before a download
    dataset = load(script, mixture)
    shape = shaping(own, model, trust_remote_code=config.trust_remote_code)
    evaluates = config.eval_strategy != "no"
    trainer = GRPOPlusTrainer(
        **loading(model, config),
        reward_funcs=rewards.train,
        eval_reward_funcs=rewards.evaluation,
        args=config,
        train_dataset=shape(split(dataset, script.dataset_train_split, "--dataset_train_split")),
        eval_dataset=shape(split(dataset, script.dataset_test_split, "--dataset_test_split")) if evaluates else None,
    )
    trainer.add_callback(StepProfile(trainer))
    trainer.accelerator.print(config.describe())
    began = time.monotonic()
    with _information() if trainer.accelerator.is_main_process else nullcontext():
        trainer.train(resume_from_checkpoint=_checkpoint(config.resume_from_checkpoint))
    trainer.save_model(config.output_dir)
    if trainer.accelerator.is_main_process:
        _close(trainer, time.monotonic() - began)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def _close(trainer: "GRPOPlusTrainer", seconds: float) -> None:
    """Print what became of the training."""
    from rich.console import Console

    from grpo_plus.cli.closing import closing_table, next_commands

    console = Console(highlight=False)
    console.print()
    console.print(closing_table(trainer, seconds))
    console.print("Next:", *next_commands(trainer), sep="\n", markup=False, soft_wrap=True)


def _check_evaluates(own: OwnArguments, config: "GRPOPlusConfig") -> None:
    """Refuse settings of evaluations that never run."""
    for name, value in (
        ("eval_reward_funcs", own.eval_reward_funcs),
        ("eval_pass_at_k", config.eval_pass_at_k),
    ):
        if value and config.eval_strategy == "no":
            raise ValueError(f"--{name} has no effect without evaluations. Add --eval_strategy steps --eval_steps 50.")


def _checkpoint(given: Any) -> Any:
    """`--resume_from_checkpoint true` is text to TRL's parser, and no folder."""
    return {"true": True, "false": None}.get(str(given).lower(), given)


@contextmanager
def _information() -> Iterator[None]:
    """Print what grpo_plus logs about its choices, such as the form that rows take through the model."""
    logger = logging.getLogger("grpo_plus")
    level, handler = logger.level, logging.StreamHandler()
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
