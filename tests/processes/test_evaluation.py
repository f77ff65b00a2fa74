"""pass@k under two processes (gloo): over the prompts of both, and none of them twice."""

import pytest

from tests.processes.jobs import job
from tests.processes.test_advantages import read

# Prompts 0+0, 0+4, 1+3, 2+2 and 3+1. A batch holds two of them, so that accelerate repeats the first one at the end.
HELD_OUT = job(
    "held_out",
    held_out=5,
    max_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    per_device_eval_batch_size=4,
    eval_pass_at_k=[1, 4],
)


def test_two_ranks_count_every_prompt_once(runs):
    for log in read(runs / HELD_OUT, "log"):
        (evaluation,) = (entry for entry in log if "eval_loss" in entry)
        assert [evaluation["eval_pass@1"], evaluation["eval_pass@4"]] == pytest.approx([3 / 5, 3 / 5])
