"""Two processes (gloo) that train twice end with the same bits both times."""

import json

from tests.processes.jobs import job
from tests.processes.test_resuming import read

SETTINGS = {
    "deterministic": True,
    "lora": True,
    "half_dead": True,
    "advantage_estimator": "rloo",
    "max_refills": 1,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 2,
}
FIRST, SECOND = (job(f"deterministic-{name}", **SETTINGS) for name in ("first", "second"))


def test_two_processes_train_twice_to_the_same_bits(runs):
    assert read(runs / FIRST, "weights") == read(runs / SECOND, "weights")
    assert read(runs / FIRST, "rows") == read(runs / SECOND, "rows")
    assert len(read(runs / FIRST, "calls")[0]) > 2  # some were refills
    first, second = (
        json.loads((runs / name / "checkpoint-2/grpo_plus_manifest.json").read_text()) for name in (FIRST, SECOND)
    )
    assert first["weights_sha256"] == second["weights_sha256"] is not None
    assert first["files"]["optimizer.pt"] == second["files"]["optimizer.pt"]
