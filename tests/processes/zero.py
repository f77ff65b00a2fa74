"""One rank of a training under DeepSpeed ZeRO-3 on CPUs, which talk over gloo."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.comm import torch as backend

from grpo_plus import GRPOPlusTrainer
from tests.processes import worker

CONFIG = {
    # Small weights would stay whole.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def whole_weights(trainer: GRPOPlusTrainer) -> dict[str, torch.Tensor]:
    """As one process has them. All processes must ask."""
    weights = dict(trainer.model.named_parameters())
    assert all(weight.ds_tensor.numel() < weight.ds_numel for weight in weights.values())
    with deepspeed.zero.GatheredParameters(list(weights.values())):
        return {name: weight.detach().clone() for name, weight in weights.items()}


if __name__ == "__main__":
    backend.build_shm_op = lambda: None  # it would be compiled, for a sum in shared memory that gloo computes, too
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    worker.whole_weights = whole_weights
    worker.train(Path(sys.argv[1]), {**json.loads(sys.argv[2]), "deepspeed": CONFIG})
