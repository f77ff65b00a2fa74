"""FSDP2 over two processes (gloo): the weights of one process after ten steps, with rows packed by segments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.close import assert_close
from tests.processes import worker
from tests.processes.jobs import job
from tests.processes.test_packing import CONFIG, PAIRS, weights

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
TEN_STEPS = {
    "given": True,
    "half_dead": True,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "max_completion_length": 12,
    "optim": "sgd",  # Adam divides gradients near zero by their own size
    "learning_rate": 0.1,
}
KINDS = {
    "full": {"advantage_estimator": "dr_grpo", "per_device_train_batch_size": 4, "max_refills": 1},
    # Groups across processes, an estimator that remembers, a reference, and an old policy scored in two parts.
    "lora": {
        "lora": True,
        "advantage_estimator": "ema_task",
        "task_column": "task",
        "per_device_train_batch_size": 2,
        "num_iterations": 2,
        "gradient_checkpointing": True,
        "beta": 0.1,
    },
}
SPREAD = {kind: job(f"sharded-{kind}", **TEN_STEPS, **extra, **FSDP) for kind, extra in KINDS.items()}
SAMPLED = job("sharded-sampled", **CONFIG, packing="shared_prompt", **FSDP)
SAVED = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, **FSDP}
WHOLE = job("sharded-whole", **SAVED)
RESUMED = job("sharded-resumed", resume_from=f"{WHOLE}/checkpoint-1", **SAVED)


def read(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one(kind, tmp_path_factory) -> Path:
    """The same training in one process, with all rows."""
    folder = tmp_path_factory.mktemp(kind)
    rows = 2 * KINDS[kind]["per_device_train_batch_size"]
    worker.train(folder, {**TEN_STEPS, **KINDS[kind], "per_device_train_batch_size": rows})
    return folder


def test_ten_steps_with_spread_weights_are_those_of_one_process(runs, one, kind):
    for rank in range(2):
        assert read(runs / SPREAD[kind], "packing", rank) == "shared_prompt (segment attention)"
        assert set(read(runs / SPREAD[kind], "spread", rank)) == set(read(one, "weights"))  # and not DDP
        assert read(runs / SPREAD[kind], "state", rank) == read(one, "state")
    start = torch.tensor(read(one, "start"))
    both, alone = (flat(read(folder, "weights")) - start for folder in (runs / SPREAD[kind], one))
    assert_close("update", both, alone, rtol=1e-6)


def flat(weights: dict[str, Any]) -> torch.Tensor:
    return torch.cat([torch.tensor(values).flatten() for values in weights.values()])


def test_a_process_whose_micro_batch_is_all_dead_keeps_no_other_waiting(runs):
    dead = [[], []]
    for rank in range(2):
        advantages = [advantage for _, _, advantage in read(runs / SPREAD["full"], "rows", rank)]
        dead[rank] = [not any(advantages[at : at + 4]) for at in range(0, len(advantages), 4)]
    assert any(here != there for here, there in zip(*dead, strict=True))


def test_sampled_completions_train_the_weights_of_whole_models(runs):
    plain = runs / PAIRS["plain"]["off"]
    assert_close("weights", weights(runs / SAMPLED, 0), weights(plain, 0), rtol=1e-6)


def test_a_run_with_spread_weights_resumes_to_the_same_weights(runs):
    log = read(runs / RESUMED, "log")
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert read(runs / RESUMED, "weights") == read(runs / WHOLE, "weights")
