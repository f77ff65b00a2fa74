"""Names of an arm's run at W&B, trackio and other loggers, and the end of that run."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import WandbCallback, get_reporting_integration_callbacks

from grpo_plus.compare.plan import Arm
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.trainer import GRPOPlusTrainer

NO_PROJECT = TrainingArguments.__dataclass_fields__["project"].default


def name_run(config: GRPOPlusConfig, arm: Arm, comparison: Path) -> None:
    """Name the arm's run after the comparison and the arm, and its project after the comparison.

    A `run_name` or `project` of the user's takes the place of the comparison's name. Trackio continues a run of the
    same name in the same project, so two comparisons need different names.
    """
    config.run_name = f"{config.run_name or comparison.name}-{arm.folder}"
    if config.project == NO_PROJECT:
        config.project = comparison.name


@contextmanager
def run_of_its_own(trainer: GRPOPlusTrainer) -> Iterator[None]:
    """Let the loggers see what happens inside, and no more.

    Transformers leaves a W&B run open, and the next arm would log into it. TRL fails where it generates for trackio
    without a run, as the held-out evaluation does. A W&B run that was open before is the user's, and stays open.
    """
    callbacks = get_reporting_integration_callbacks(trainer.args.report_to)
    wandb = import_module("wandb") if WandbCallback in callbacks else None
    ours, failed = wandb is not None and wandb.run is None, True
    try:
        yield
        failed = False
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)
        trainer.args.report_to = []
        if wandb is not None and ours:
            wandb.finish(exit_code=int(failed))
