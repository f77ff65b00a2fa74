"""Dtype and rounding of the operators' matrix products."""

import torch
from torch import Tensor


def compute_dtype(input: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, else the dtype of the input."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 total, without rounding the product to the factors' dtype first."""
    if total.dtype != left.dtype and total.device.type == "cuda" and torch.__version__ >= "2.8":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
