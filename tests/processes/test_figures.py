"""Figures in the log under two processes: every process has those of all of them."""

import json

from tests.processes import test_advantages, test_guard, test_packing
from tests.processes.jobs import JOBS

ENTERED = (test_advantages.REFILLED, test_guard.SKIPPED, *test_packing.PAIRS["lora"].values())  # whatever else is run

OF_THE_CLOCK = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
OF_THE_CLOCK |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}


def test_every_process_logs_the_same(runs):
    compared: dict[str, int] = {}
    for name in JOBS:
        paths = [runs / name / f"log_{rank}.json" for rank in range(2)]
        if not paths[0].exists():  # a command, or a run that ends in an error
            continue
        first, second = (
            [{key: value for key, value in entry.items() if key not in OF_THE_CLOCK} for entry in json.loads(text)]
            for text in (path.read_text() for path in paths)
        )
        first_text, second_text = (json.dumps(log, sort_keys=True) for log in (first, second))  # NaN equals NaN
        assert first_text == second_text, name
        for key in {key.partition("/")[0] for entry in first for key in entry}:
            compared[key] = compared.get(key, 0) + 1
    assert set(ENTERED) <= JOBS.keys()
    assert {"packing", "rollout", "sampling", "guard", "profile", "kl", "entropy", "advantages"} <= compared.keys()
