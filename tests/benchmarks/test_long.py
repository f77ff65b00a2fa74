"""The benchmark of bounded passes on a model that takes no time: both ways agree, and the parts are what runs."""

import pytest

from benchmarks import long, update
from grpo_plus.packing import recomputed

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8000, "head_dim": 8}


@pytest.mark.parametrize("variant", ["full", "nf4-checkpointing", "lora-checkpointing"])
def test_parts_and_one_pass_agree(monkeypatch, variant):
    monkeypatch.setattr(update, "CPU_MODEL", update.CPU_MODEL | TINY)
    calls = []
    monkeypatch.setattr(recomputed, "_called", lambda place, part: calls.append(part) or part())
    row = long.measure((12, 8, 6), 2, variant, "both", "cpu", 1)
    assert row["gradient_error"] < 1e-6
    assert row["passes"] == 3
    # Two of three passes are computed twice, once for the gradient and once for the time.
    assert len(calls) == 2 * 2 * 2
