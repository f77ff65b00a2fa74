"""Deterministic algorithms of torch and of the libraries below it, while a training runs.

transformers' `full_determinism` sets the same for the rest of the process. It also makes the host wait for every kernel
(CUDA_LAUNCH_BLOCKING), which equal bits do not need.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl import GRPOConfig

from grpo_plus.config import GRPOPlusConfig

# cuBLAS reads its variable once, before its first product. The values are those with which products are deterministic.
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # transformers reads it at every call of flash-attn


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Compute with deterministic algorithms alone. Afterwards the settings of the process are what they were.

    An operation that has no such algorithm raises torch's RuntimeError, with its name.
    """
    cudnn: Any = torch.backends.cudnn
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    of_cudnn, flash = (cudnn.deterministic, cudnn.benchmark), os.environ.get(FLASH)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark, os.environ[FLASH] = True, False, "1"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        cudnn.deterministic, cudnn.benchmark = of_cudnn
        if flash is None:
            del os.environ[FLASH]
        else:
            os.environ[FLASH] = flash


def prepare_cublas(args: GRPOConfig | None) -> None:
    """Set cuBLAS's variable for a deterministic run, before the trainer computes anything.

    The variable stays set after the training: cuBLAS has read it and would not read it again.

    Raises:
        ValueError: cuBLAS has computed with other settings in this process.
    """
    if isinstance(args, GRPOPlusConfig) and args.deterministic and args.device.type == "cuda":
        choose_workspace()
        with deterministic_algorithms():
            _check_product(args.device)


def choose_workspace() -> None:
    """Set the variable where it is unset, and refuse a value with which products are not deterministic."""
    value = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if value not in WORKSPACES:
        raise ValueError(
            f"deterministic=True needs {WORKSPACE} to be {' or '.join(WORKSPACES)}, but the environment has {value!r}. "
            "Unset it, or set one of these."
        )


def _check_product(device: torch.device) -> None:
    one = torch.ones(1, 1, device=device)
    try:
        one @ one
    except RuntimeError as error:
        if WORKSPACE not in str(error):
            raise
        raise ValueError(
            "deterministic=True comes too late: cuBLAS has computed in this process before the trainer was built. "
            f"Set {WORKSPACE}={WORKSPACES[0]} in the environment, before the process starts."
        ) from error
