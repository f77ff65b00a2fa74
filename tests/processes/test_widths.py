"""Advantages per token under two processes, whose completions differ in their longest."""

import pytest
import torch

from grpo_plus.advantages import Steps, process_advantages
from tests.processes.jobs import job
from tests.processes.test_advantages import SPLIT, read, tables_of

# With 512 tokens allowed, the completions end by themselves, and each rank pads to its own longest one.
WIDTHS = job("widths", advantage_estimator="process", max_steps=1, max_completion_length=512, **SPLIT)


def test_two_ranks_of_different_widths_train_the_tokens_that_the_whole_table_gives(runs):
    ranks = read(runs / WIDTHS, "rows")
    widths = [{len(completion) for _, completion, _ in rows} for rows in ranks]
    assert len(widths[0]) == len(widths[1]) == 1
    assert widths[0] != widths[1]
    (table,) = tables_of(runs / WIDTHS)
    ends = table["step_ends"].tolist()
    lengths = torch.tensor([int(row[-1]) + 1 for row in ends]).view(3, 4)  # the last step ends with the completion
    steps = Steps.from_rows(table["step_rewards"].tolist(), ends, lengths=lengths)
    expected = process_advantages(
        steps.rewards.flatten(0, 1), steps.ends.flatten(0, 1), num_generations=4, num_tokens=512
    )
    for rank, rows in enumerate(ranks):
        (width,) = widths[rank]
        assert {len(advantages) for _, _, advantages in rows} == {width}
        mine = range(6 * rank, 6 * rank + 6)
        logged = sorted((table["prompt"][row], expected[row, :width].tolist()) for row in mine)
        for (prompt, advantages), (known, values) in zip(sorted((p, a) for p, _, a in rows), logged, strict=True):
            assert prompt == known
            assert advantages == pytest.approx(values, abs=1e-5)
    means = expected.sum(-1) / lengths.flatten()
    torch.testing.assert_close(torch.tensor(table["advantage"].to_numpy()), means, rtol=0, atol=1e-5)
