"""Advantages under two processes (gloo): each rank trains the rows that one process computes, groups across ranks."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from grpo_plus.advantages import estimate
from tests.advantages.cases import rewards_of
from tests.processes.jobs import job
from tests.refilling import Judge, expected_batches, groups_of, is_dead

# 6 rows a rank, groups of 4: the second of three groups has two rows on each rank.
SPLIT = {"num_generations": 4, "per_device_train_batch_size": 6}
TABLES = {
    name: job(name, advantage_estimator=name, reward_weights=[1.0, 0.5], max_steps=2, **SPLIT)
    for name in ("rloo", "gdpo")
}
# A live group moves from any place to any other, the one across the ranks included; each batch is trained on twice.
REFILLED = job(
    "refilled", half_dead=True, max_refills=2, num_iterations=2, advantage_estimator="rloo", max_steps=6, **SPLIT
)


def read(folder: Path, name: str) -> list:
    """What each rank wrote under that name."""
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)]


def tables_of(folder: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(path) for path in sorted((folder / "completions").glob("*.parquet"))]


@pytest.mark.parametrize("estimator", TABLES)
def test_two_ranks_train_the_rows_that_the_whole_table_gives(runs, estimator):
    folder = runs / TABLES[estimator]
    ranks = read(folder, "rows")
    assert [len(rows) for rows in ranks] == [12, 12]
    for step, table in enumerate(tables_of(folder)):
        values = torch.tensor(table[["vowels", "brevity"]].to_numpy()).view(3, 4, 2)
        expected = estimate(estimator, rewards_of(values.tolist(), [1.0, 0.5])).flatten()
        torch.testing.assert_close(torch.tensor(table["advantage"].to_numpy()), expected, rtol=0, atol=1e-6)
        for rank, rows in enumerate(ranks):
            trained = sorted((prompt, advantage) for prompt, _, advantage in rows[6 * step : 6 * step + 6])
            mine = slice(6 * rank, 6 * rank + 6)
            logged = sorted(zip(table["prompt"][mine], expected[mine].tolist(), strict=True))
            assert [prompt for prompt, _ in trained] == [prompt for prompt, _ in logged]
            assert [advantage for _, advantage in trained] == pytest.approx([a for _, a in logged], abs=1e-5)


def test_a_group_across_two_ranks_is_refilled_on_both(runs):
    folder = runs / REFILLED
    ranks, calls = read(folder, "rows"), read(folder, "calls")
    judge = Judge()
    judge.calls = [[tuple(row) for row in [*first, *second]] for first, second in zip(*calls, strict=True)]
    prompts = [{prompt for prompt, _ in group} for call in judge.calls for group in groups_of(call)]
    assert [mixed for mixed in prompts if len(mixed) != 1] == []
    log = read(folder, "log")[0]
    refills = [int(entry["sampling/refills"]) for entry in log if "sampling/refills" in entry]
    batches, firsts = expected_batches(judge, refills), [sum(refills[:step]) + step for step in range(3)]
    assert any(
        is_dead(judge.calls[call][4][0]) != is_dead(rows[4][0]) for call, rows in zip(firsts, batches, strict=True)
    )
    for step, rows in enumerate(batches):
        table = pd.read_parquet(folder / "completions" / f"completions_{2 * step + 1:05d}.parquet")
        assert list(zip(table["prompt"], table["completion"], strict=True)) == rows
        for rank, trained in enumerate(ranks):
            own = sorted((prompt, advantage) for prompt, _, advantage in trained[12 * step : 12 * step + 6])
            shown = table[6 * rank : 6 * rank + 6]
            logged = sorted(zip(shown["prompt"], shown["advantage"], strict=True))
            assert [prompt for prompt, _ in own] == [prompt for prompt, _ in logged]
            assert [advantage for _, advantage in own] == pytest.approx([a for _, a in logged], abs=1e-5)
    for drifts in read(folder, "drifts"):
        assert max(drifts[::2]) < 1e-4 < max(drifts[1::2])
    for (first, first_total), (second, second_total) in zip(*read(folder, "tokens"), strict=True):
        assert first_total == second_total == first + second
