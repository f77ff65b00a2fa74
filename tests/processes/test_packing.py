"""The speed-ups under two processes (gloo): the weights of a run without them, with groups across ranks and dead rows."""

import json
from pathlib import Path

import pytest
import torch

from tests.close import assert_close
from tests.processes.jobs import job

CONFIG = {
    "num_generations": 4,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "max_completion_length": 16,
    "optim": "sgd",  # Adam divides gradients near zero by their own size
    "learning_rate": 0.5,
    "advantage_estimator": "dr_grpo",
    "advantage_modifiers": {"clip": {"max": 0.5}},
}
SWITCHES = {
    "off": {"packing": "none", "skip_zero_advantage": False, "lora_backend": "peft", "generation_loop": "trl"},
    "on": {"packing": "shared_prompt"},
}
# Of the run with the speed-ups.
BOUNDED = {"plain": {"mlp_tile_tokens": 16}, "reused": {"max_tokens_per_pass": 40}, "lora": {"mlp_tile_tokens": 16}}
KINDS = {
    "plain": {},
    "reused": {"gradient_checkpointing": True, "num_iterations": 2},
    "lora": {"lora": True},
    "truncated": {"top_p": 0.7, "truncated_sampling": "correct"},
}
# What packs and decodes on one process fails on the other.
REFUSED = job("refused", **CONFIG, refuses=1)
PAIRS = {
    kind: {
        "off": job(f"{kind}-off", **CONFIG, **extra, **SWITCHES["off"]),
        "on": job(f"{kind}-on", **CONFIG, **extra, **SWITCHES["on"], **BOUNDED.get(kind, {})),
    }
    for kind, extra in KINDS.items()
}


def weights(folder: Path, rank: int) -> torch.Tensor:
    """All, or with adapters those of lora_B alone: they start at 0, so that nothing else is in them than the updates."""
    saved = json.loads((folder / f"weights_{rank}.json").read_text())
    adapters = {name: values for name, values in saved.items() if "lora_B" in name}
    return torch.cat([torch.tensor(values).flatten() for values in (adapters or saved).values()])


@pytest.mark.parametrize("kind", PAIRS)
def test_two_ranks_train_the_same_weights_with_and_without(runs, kind):
    off, on = (runs / PAIRS[kind][name] for name in SWITCHES)
    assert torch.equal(weights(on, 0), weights(on, 1))
    assert weights(on, 0).norm() > 0
    assert_close("weights", weights(on, 0), weights(off, 0), rtol=5e-6 if kind == "lora" else 1e-6)


def test_what_fails_on_one_rank_is_done_by_none(runs):
    folder = runs / REFUSED
    forms = [json.loads((folder / f"packing_{rank}.json").read_text()) for rank in range(2)]
    assert forms == [["shared_prompt (two passes through the model's cache)"]] * 2
    first, second = (entry for entry in json.loads((folder / "log_0.json").read_text()) if "loss" in entry)
    # Each process learns what it cannot decode while it does, and the others from the next batch on.
    assert "rollout/live_rows" in first
    assert "rollout/live_rows" not in second
    assert_close("weights", weights(folder, 0), weights(runs / PAIRS["plain"]["off"], 0), rtol=1e-6)


def test_the_bound_of_all_ranks_is_the_least_that_one_finds(runs):
    for rank in range(2):
        assert json.loads((runs / REFUSED / f"least_{rank}.json").read_text()) == [24, 7, None]


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_the_share_of_live_rows_is_that_of_all_ranks(runs, kind):
    folder = runs / PAIRS[kind]["on"]
    ranks = [json.loads((folder / f"rows_{rank}.json").read_text()) for rank in range(2)]
    # Every rank forwards one row of a micro-batch in which nothing lives.
    live = [
        [max(1, sum(advantage != 0 for _, _, advantage in rows[at : at + 6])) for at in range(0, len(rows), 6)]
        for rows in ranks
    ]
    expected = [sum(rank[step] + rank[step + 1] for rank in live) / 24 for step in range(0, len(live[0]), 2)]
    log = json.loads((folder / "log_0.json").read_text())
    logged = [entry["packing/live_fraction"] for entry in log if "packing/live_fraction" in entry]
    assert logged == pytest.approx(expected)
    # What rank 0 alone would have said.
    assert logged != pytest.approx([sum(live[0][step : step + 2]) / 12 for step in range(0, len(live[0]), 2)])
