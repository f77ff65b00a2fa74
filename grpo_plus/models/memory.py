"""When a device has no memory left."""

import torch

# cuBLAS and cuDNN allocate their workspaces themselves, and report a failure as an error of their own.
# The driver, Triton and Apple's MPS say it in words: "CUDA error: out of memory".
ALLOCATIONS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether a failure says that the device has no memory left."""
    return isinstance(failure, torch.OutOfMemoryError) or any(name in str(failure) for name in ALLOCATIONS)
