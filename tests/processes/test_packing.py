"""The speed-ups under two processes (gloo): the weights of a run without them, with groups across ranks and dead rows."""

import json

import pytest
import torch

from tests.close import assert_close
from tests.processes.test_advantages import run

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
OFF = {"packing": "none", "skip_zero_advantage": False}


def weights(folder, rank: int) -> torch.Tensor:
    saved = json.loads((folder / f"weights_{rank}.json").read_text())
    return torch.cat([torch.tensor(values).flatten() for values in saved.values()])


@pytest.mark.parametrize("extra", [{}, {"gradient_checkpointing": True, "num_iterations": 2}], ids=["plain", "reused"])
def test_two_ranks_train_the_same_weights_with_and_without(tmp_path, extra):
    for name, switches in (("off", OFF), ("on", {"packing": "shared_prompt"})):
        run(tmp_path / name, processes=2, **CONFIG, **extra, **switches)
    assert torch.equal(weights(tmp_path / "on", 0), weights(tmp_path / "on", 1))
    assert_close("weights", weights(tmp_path / "on", 0), weights(tmp_path / "off", 0), rtol=1e-6)
