"""A trainer that believes its weights to be spread, by plug-ins of accelerate's own."""

from typing import Any

import pytest
from accelerate import DistributedType
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from trl import GRPOTrainer


def under_zero(trainer: GRPOTrainer, patch: pytest.MonkeyPatch, stage: int, **settings: Any) -> None:
    """As under DeepSpeed at this stage of ZeRO, with these settings."""
    state = vars(trainer.accelerator.state)
    patch.setitem(state, "distributed_type", DistributedType.DEEPSPEED)
    patch.setitem(state, "deepspeed_plugins", DeepSpeedPlugin(zero_stage=stage, **settings))
    patch.setattr(trainer, "is_deepspeed_enabled", True)


def under_fsdp(trainer: GRPOTrainer, patch: pytest.MonkeyPatch, *, version: int = 2, **settings: Any) -> None:
    """As under FSDP with these settings."""
    state = vars(trainer.accelerator.state)
    patch.setitem(state, "distributed_type", DistributedType.FSDP)
    patch.setitem(state, "fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=version, **settings))
    patch.setattr(trainer, "is_fsdp_enabled", True)
