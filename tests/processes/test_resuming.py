"""Two processes (gloo) that stop inside a generation batch go on as if they had not, each with its own rows."""

import json
from pathlib import Path

from grpo_plus.trainer.saving.checkpoints import numbered, why_unusable
from tests.processes.jobs import job

# A batch lasts for four micro-batches, which are two steps.
INSIDE = {
    "num_iterations": 2,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 6,
    "num_generations": 4,
    "advantage_estimator": "ema_task",
    "task_column": "answer",
    "max_completion_length": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 4,
}
WHOLE = job("inside", **INSIDE)
RESUMED = job("inside-resumed", resume_from="inside/checkpoint-3", **INSIDE)
# One process has a batch and the other has none: were each to go its own way, one would wait for the other forever.
OTHER = INSIDE | {"per_device_train_batch_size": 4, "max_steps": 2}
CHANGED = job("inside-changed", resume_from="inside/checkpoint-1", **OTHER)
JUDGED = INSIDE | {"save_steps": 100}
DOWN = job("inside-down", fails_after=1, **JUDGED)
RESCUED = job("inside-rescued", resume_from="inside-down/checkpoint-2", fails_after=100, **JUDGED)
UNDISTURBED = job("inside-undisturbed", fails_after=100, **JUDGED)


def read(folder: Path, name: str) -> list:
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_resume_inside_a_batch_to_the_same_run(runs):
    assert read(runs / RESUMED, "weights") == read(runs / WHOLE, "weights")
    assert read(runs / RESUMED, "state") == read(runs / WHOLE, "state")
    for resumed, whole in zip(read(runs / RESUMED, "rows"), read(runs / WHOLE, "rows"), strict=True):
        assert resumed == whole[-len(resumed) :]
    files = json.loads((runs / WHOLE / "checkpoint-3/grpo_plus_manifest.json").read_text())["files"]
    assert {
        f"{kind}_{rank}{end}" for rank in (0, 1) for kind, end in (("rng_state", ".pth"), ("grpo_plus_position", ".pt"))
    } < set(files)


def test_another_batch_size_goes_on_with_a_fresh_batch_on_both(runs):
    assert [len(rows) for rows in read(runs / CHANGED, "rows")] == [8, 8]


def test_a_judge_that_is_down_on_one_process_leaves_the_last_step_of_both(runs):
    assert all("judge" in error for error in read(runs / DOWN, "error"))
    assert list(numbered(runs / DOWN)) == [2]
    assert why_unusable(runs / DOWN / "checkpoint-2") is None
    assert read(runs / RESCUED, "weights") == read(runs / UNDISTURBED, "weights")
