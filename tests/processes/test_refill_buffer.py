"""Groups of earlier batches under two processes (gloo): a group goes from any place to any other, on both ranks."""

import json

import pandas as pd

from tests.processes.jobs import job
from tests.refilling import groups_of, is_dead

HELD = job(
    "held",
    half_dead=True,
    num_generations=4,
    per_device_train_batch_size=6,  # the second of three groups has two rows on each rank
    refill_buffer=2,
    advantage_estimator="rloo",
    max_steps=4,
)


def expected_batches(calls: list[list]) -> list[list]:
    """The rows of each batch. Dead slots in order take the newest groups, each once and none older than two batches."""
    held: list[tuple[int, list]] = []
    batches = []
    for step, rows in enumerate(calls):
        groups = groups_of(rows)
        held = sorted((entry for entry in held if entry[0] >= step - 2), key=lambda entry: -entry[0])
        fresh = [(step, group) for group in groups if not is_dead(group[0][0])]
        for slot in [slot for slot, group in enumerate(groups) if is_dead(group[0][0])][: len(held)]:
            groups[slot] = held.pop(0)[1]
        held += fresh
        batches.append([row for group in groups for row in group])
    return batches


def test_two_ranks_train_on_the_newest_groups_in_the_place_of_dead_ones(runs):
    def read(name: str) -> list:
        return [json.loads((runs / HELD / f"{name}_{rank}.json").read_text()) for rank in range(2)]

    calls = [[tuple(row) for row in [*ours, *others]] for ours, others in zip(*read("calls"), strict=True)]
    batches, trained, tokens = expected_batches(calls), read("rows"), read("tokens")
    assert sum(rows != call for rows, call in zip(batches, calls, strict=True)) >= 2
    for step, rows in enumerate(batches):
        table = pd.read_parquet(runs / HELD / "completions" / f"completions_{step + 1:05d}.parquet")
        assert list(zip(table["prompt"], table["completion"], strict=True)) == rows
        for rank in range(2):
            mine = slice(6 * step, 6 * step + 6)
            met = sorted((prompt, round(advantage, 3)) for prompt, _, advantage in trained[rank][mine])
            own = table[6 * rank : 6 * rank + 6]
            assert met == sorted(zip(own["prompt"], own["advantage"].round(3), strict=True))
        assert tokens[0][step][1] == tokens[1][step][1] == tokens[0][step][0] + tokens[1][step][0]
    assert max(map(max, read("drifts"))) > 1e-3  # from the policies that sampled the older groups
