"""Two processes: a loss that is not finite on one of them, and a signal to one of them, are every process's."""

import json

import torch

from tests.processes.jobs import job

SETTINGS = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
SKIPPED = job("guard-skipped", **SETTINGS, spoiled={"rank": 1, "calls": [2]})
STOPPED = job("guard-stopped", **SETTINGS, max_nonfinite_steps=2, spoiled={"rank": 1, "calls": list(range(2, 9))})
INFINITE = job("guard-infinite", **SETTINGS, infinite={"rank": 1})
SIGNALLED = job("guard-signalled", **SETTINGS | {"max_steps": 9}, signalled={"rank": 1, "step": 2})
ALONE = job("guard-alone", **SETTINGS | {"max_steps": 1}, saves_alone=True)


def read(runs, name, what, rank):
    return json.loads((runs / name / f"{what}_{rank}.json").read_text())


def tensors(runs, name, rank):
    return [torch.tensor(values) for values in read(runs, name, "weights", rank).values()]


def test_one_ranks_nan_is_skipped_by_both(runs):
    for rank in (0, 1):
        log = [entry for entry in read(runs, SKIPPED, "log", rank) if "loss" in entry]
        assert [entry.get("guard/skipped_steps") for entry in log] == [None, 1, 1]
        assert [torch.tensor(entry["loss"]).isfinite().item() for entry in log] == [True, False, True]
        assert all(weight.isfinite().all() for weight in tensors(runs, SKIPPED, rank))
    assert all(map(torch.equal, tensors(runs, SKIPPED, 0), tensors(runs, SKIPPED, 1)))


def test_both_stop_at_the_same_step_and_leave_a_checkpoint(runs):
    for rank in (0, 1):
        error = read(runs, STOPPED, "error", rank)
        assert error.startswith("RuntimeError: Steps 2 to 3 were skipped")
        assert f"nonfinite_step_3_rank_{rank}.pt" in error
        written = torch.load(runs / STOPPED / f"nonfinite_step_3_rank_{rank}.pt", weights_only=True)
        finite = [torch.tensor(loss).isfinite().item() for loss in written["losses"]]
        assert finite == [rank == 0] * 2
    assert (runs / STOPPED / "checkpoint-3" / "trainer_state.json").exists()


def test_one_ranks_infinite_reward_is_the_error_of_both(runs):
    errors = [read(runs, INFINITE, "error", rank) for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("ValueError: The reward function 'vowels' returned inf for completion ")


def test_a_signal_to_one_rank_ends_both_after_the_same_step(runs):
    for rank in (0, 1):
        assert read(runs, SIGNALLED, "error", rank) == "SystemExit: 0"
    assert [path.name for path in (runs / SIGNALLED).glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_first_process_can_save_the_model_alone(runs):
    assert (runs / ALONE / "alone" / "model.safetensors").exists()
