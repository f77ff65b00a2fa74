"""Turns under two processes: those of a group are compared wherever they were written."""

import torch

from grpo_plus.advantages import Rewards, estimate
from tests.processes.jobs import job
from tests.processes.test_advantages import SPLIT, tables_of

TURNS = job("turns", advantage_estimator="turns", max_steps=1, max_completion_length=24, **SPLIT)


def test_turns_of_a_group_are_compared_across_the_ranks(runs):
    (table,) = tables_of(runs / TURNS)
    rewards, ends, states = (table[name].tolist() for name in ("step_rewards", "step_ends", "step_states"))
    first, second = ({state for row in part for state in row} for part in (states[:6], states[6:]))
    assert first & second
    values = torch.tensor(table["turnwise"].to_numpy()).unsqueeze(1)
    lengths = torch.tensor([row[-1] + 1 for row in ends])
    whole = Rewards.from_table(
        values,
        num_generations=4,
        weights=torch.ones(1),
        names=("turnwise",),
        lengths=lengths,
        steps=(rewards, ends, states),
    )
    expected = whole.per_completion(estimate("turns", whole)).flatten()
    torch.testing.assert_close(torch.tensor(table["advantage"].to_numpy()), expected, rtol=0, atol=1e-5)
