"""Reward functions under two processes (gloo): an error ends every process, and calls beside the step change nothing."""

import json

from tests.processes.jobs import job

SHORT = {"max_steps": 1, "per_device_train_batch_size": 6, "num_generations": 4}
FAILS = job("fails", fails="rewards", **SHORT)
STEPS = job("fails-in-steps", fails="steps", advantage_estimator="process", **SHORT)
SPLIT = {"num_generations": 4, "per_device_train_batch_size": 6}  # the second of three groups is on both processes
BESIDE = {
    way: job(f"beside-{way}", overlap_rewards=way, max_steps=2, generation_chunk_size=4, **SPLIT)
    for way in (None, "groups")
}


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


def test_groups_that_are_judged_beside_the_step_train_the_same(runs):
    for name in ("weights_0", "rows_0", "rows_1"):
        alone, beside = (json.loads((runs / BESIDE[way] / f"{name}.json").read_text()) for way in (None, "groups"))
        assert alone == beside
