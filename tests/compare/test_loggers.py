"""Each arm is a run of its own at W&B and trackio. The callbacks are transformers'; what they call stands in."""

import functools
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from grpo_plus.compare.loggers import name_run, run_of_its_own
from grpo_plus.compare.plan import Arm, Variant
from grpo_plus.compare.train import compare
from tests.compare import small
from tests.compare.small import small_task


class Settings(dict):
    def update(self, values, allow_val_change):
        super().update(values)


class Logger(ModuleType):
    """As much of wandb or trackio as transformers and TRL call: runs, and what is logged into them."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.runs, self.run, self.config = [], None, Settings()
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, project, name=None, **_):
        self.run = SimpleNamespace(project=project, name=name, logs=0, exit_code=None, summary={}, _label=lambda **_: 0)
        self.runs.append(self.run)

    def log(self, values, **_):
        assert self.run is not None, "as trackio: call init before log"
        self.run.logs += 1

    def finish(self, exit_code=0):
        self.run.exit_code, self.run = exit_code, None


@pytest.fixture
def loggers(monkeypatch):
    made = {name: Logger(name) for name in ("wandb", "trackio")}
    for name, logger in made.items():
        monkeypatch.setitem(sys.modules, name, logger)
        monkeypatch.setattr(f"trl.extras.profiling.{name}", logger, raising=False)  # as TRL imports what is installed
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", SimpleNamespace(ConfigError=ValueError))
    return made


def reporting_task(failing=None):
    def broken(completions, **_):
        raise RuntimeError("of the test")

    def trainer(model, config):
        fails = config.advantage_estimator == failing and config.run_name is not None
        return small.trainer(model, config, (broken,) if fails else (small.vowels,))

    def evaluate(trainer):
        trainer.evaluate(small.ROWS.select(range(2)))  # TRL times its generation at the loggers
        return small.sizes(trainer)

    task = small_task(trainer=trainer, evaluate=evaluate)
    config = functools.partial(task.config, report_to=["wandb", "trackio"], max_steps=1, per_device_eval_batch_size=8)
    return replace(task, config=config)


def test_every_arm_is_a_run_of_its_own_that_ends_as_the_arm_does(tmp_path, loggers):
    comparison = compare(reporting_task(failing="rloo"), ["grpo", "rloo", "opo"], [0], tmp_path / "mine")
    assert [arm.variant.label for arm in comparison.failures] == ["rloo"]
    for name, logger in loggers.items():
        assert [run.name for run in logger.runs] == ["mine-grpo-seed0", "mine-rloo-seed0", "mine-opo-seed0"]
        # For W&B, transformers takes the project from WANDB_PROJECT alone.
        assert {run.project for run in logger.runs} == {"huggingface" if name == "wandb" else "mine"}
        assert logger.runs[2].logs > 1
    assert [run.exit_code for run in loggers["wandb"].runs] == [0, 1, 0]


def test_a_run_that_was_open_before_stays_open(loggers):
    loggers["wandb"].init("of the user", "of the user")
    trainer = SimpleNamespace(args=SimpleNamespace(report_to=["wandb"]), remove_callback=lambda callback: None)
    with run_of_its_own(trainer):
        pass
    assert [run.exit_code for run in loggers["wandb"].runs] == [None]


def test_names_of_the_user_take_the_place_of_the_comparisons(tmp_path):
    config = small_task().config(output_dir=str(tmp_path), run_name="try", project="cats")
    name_run(config, Arm(Variant("grpo", "dapo"), 3), Path("folder/mine"))
    assert (config.run_name, config.project) == ("try-grpo-dapo-seed3", "cats")
