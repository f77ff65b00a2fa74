"""An error in a reward function under two processes (gloo): every process ends with it, and none waits forever."""

import json

from tests.processes.jobs import job

SHORT = {"max_steps": 1, "per_device_train_batch_size": 6, "num_generations": 4}
FAILS = job("fails", fails="rewards", **SHORT)
STEPS = job("fails-in-steps", fails="steps", advantage_estimator="process", **SHORT)


def errors(folder):
    return [json.loads((folder / f"error_{rank}.json").read_text()) for rank in range(2)]


def test_a_wrong_number_of_rewards_on_one_process_ends_both(runs):
    first, second = errors(runs / FAILS)
    assert second.startswith("The reward function 'forgetful' returned 5 rewards for 6 completions")
    assert first == f"Process 1: {second}"


def test_a_wrong_number_of_steps_on_one_process_ends_both(runs):
    first, second = errors(runs / STEPS)
    assert second.startswith("log_extra('step_rewards', ...) got 5 lists for 6 completions")
    assert first == f"Process 1: {second}"
