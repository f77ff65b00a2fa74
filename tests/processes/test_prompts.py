"""Prompts by their pass rates under two processes (gloo): both draw what one process draws from the same rewards."""

import json

import torch

from grpo_plus.trainer.batches.pass_rates import PassRates
from tests.processes.jobs import job
from tests.refilling import MIXED, Judge, groups_of

DRAWN = job(
    "drawn",
    half_dead=True,
    num_generations=4,
    per_device_train_batch_size=6,  # the second of three groups has two rows on each rank
    max_refills=1,
    advantage_estimator="rloo",
    prompt_sampler={"pass_rate": {"threshold": 40.0, "decay": 0.0}},
)


def test_two_ranks_draw_the_prompts_that_all_rewards_together_give(runs):
    first, second = (json.loads((runs / DRAWN / f"calls_{rank}.json").read_text()) for rank in range(2))
    log = json.loads((runs / DRAWN / "log_0.json").read_text())
    refills = [int(entry["sampling/refills"]) for entry in log if "sampling/refills" in entry]
    calls = [groups_of([*ours, *others]) for ours, others in zip(first, second, strict=True)]
    rates, judge, drawn = PassRates(len(MIXED), 0.0), Judge(), iter(calls)
    for step, count in enumerate(refills):
        had: list[int] = []
        for number in range(1 + count):
            groups = next(drawn)
            rows = rates.draw(3, 0.1, (7, step, number), without=had)
            assert [{prompt for prompt, _ in group} for group in groups] == [{MIXED[row]["prompt"]} for row in rows]
            rewards = torch.tensor([judge(*zip(*group, strict=True)) for group in groups])
            rates.add(rows, (rewards >= 40).sum(1), torch.full((3,), 4))
            had += rows
    assert next(drawn, None) is None
    assert len(refills) == 3
