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
    # A reference of whole weights, whose rows are packed, too.
    "reference": {"saved": True, "beta": 0.1, "per_device_train_batch_size": 4, "max_steps": 3},
}
SPREAD = {kind: job(f"sharded-{kind}", **{**TEN_STEPS, **extra, **FSDP}) for kind, extra in KINDS.items()}
SAMPLED = job("sharded-sampled", **CONFIG, packing="shared_prompt", **FSDP)
SAVED = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, **FSDP}
WHOLE = job("sharded-whole", **SAVED)
RESUMED = job("sharded-resumed", resume_from=f"{WHOLE}/checkpoint-1", **SAVED)


# What depends on which rows a process has, and on the clock.
OF_ITS_OWN = ("packing/", "profile/", "step_time")


def read(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one(kind, tmp_path_factory) -> Path:
    """What one process has written, with the rows of both."""
    return trained_alone(tmp_path_factory.mktemp(kind), kind)


def trained_alone(folder: Path, kind: str) -> Path:
    config = {**TEN_STEPS, **KINDS[kind]}
    if config.get("saved"):
        worker.save_model(folder)
    worker.train(folder, {**config, "per_device_train_batch_size": 2 * config["per_device_train_batch_size"]})
    return folder


def test_ten_steps_with_spread_weights_are_those_of_one_process(runs, one, kind):
    for rank in range(2):
        models = 2 if kind == "reference" else 1
        assert read(runs / SPREAD[kind], "packing", rank) == ["shared_prompt (segment attention)"] * models
        assert set(read(runs / SPREAD[kind], "spread", rank)) == set(read(one, "weights"))  # and not DDP
        assert read(runs / SPREAD[kind], "state", rank) == read(one, "state")
    start = torch.tensor(read(one, "start"))
    both, alone = (flat(read(folder, "weights")) - start for folder in (runs / SPREAD[kind], one))
    assert_close("update", both, alone, rtol=1e-6)


def test_the_log_is_that_of_one_process_with_all_rows(runs, one, kind):
    both, alone = ([entry for entry in read(folder, "log") if "loss" in entry] for folder in (runs / SPREAD[kind], one))
    assert len(both) == len(alone) == KINDS[kind].get("max_steps", 10)
    for entry, expected in zip(both, alone, strict=True):
        names = {name for name in entry.keys() | expected.keys() if not name.startswith(OF_ITS_OWN)}
        figures = [{name: figures[name] for name in names} for figures in (entry, expected)]
        # A process whose rows are all dead forwards one of them, whose entropy counts.
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-6)


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
