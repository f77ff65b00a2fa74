"""An error in a reward function under two processes (gloo): every process ends with it, and none waits forever."""

import json

from tests.processes.jobs import job

FAILS = job("fails", fails=True, max_steps=1, per_device_train_batch_size=6, num_generations=4)


def test_a_wrong_number_of_rewards_on_one_process_ends_both(runs):
    first, second = (json.loads((runs / FAILS / f"error_{rank}.json").read_text()) for rank in range(2))
    assert second.startswith("The reward function 'forgetful' returned 5 rewards for 6 completions")
    assert first == f"Process 1: {second}"
