"""vLLM is sent the adapters alone by two processes, which spread the weights: beside each of them, and as a server."""

import json

import pytest

from tests.processes.jobs import job

# The engine loads its base beside the trainer. Transformers would give the second process empty weights there.
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}
CONFIG = {
    "use_vllm": True,
    "vllm_lora_sync": True,
    "saved": True,
    "lora": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-2,
}
RUNS = {
    "colocate": job("vllm-colocate", **CONFIG, **FSDP),
    "server": job("vllm-server", **CONFIG, **FSDP, vllm_mode="server"),
}


@pytest.mark.parametrize("name", RUNS)
def test_rollouts_of_both_processes_come_from_the_trained_adapter(runs, name):
    spread, log = (json.loads((runs / RUNS[name] / f"{kind}_1.json").read_text()) for kind in ("spread", "log"))
    assert spread
    gaps = [entry["sampling/sampling_logp_difference/max"] for entry in log if "loss" in entry]  # of all processes
    assert len(gaps) == 2
    assert max(gaps) < 1e-3
