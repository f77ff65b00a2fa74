"""How many digits a model's products have."""

import torch
from transformers import PreTrainedModel


def precision_of_products(model: PreTrainedModel) -> str:
    """The coarsest rounding in the model's forward: "float32", "tf32" or "half"."""
    floats = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    if not floats <= {torch.float32, torch.float64} or torch.is_autocast_enabled(model.device.type):
        return "half"
    return "tf32" if rounds_products(model.device) else "float32"


def rounds_products(device: torch.device) -> bool:
    """Whether products of float32 matrices are rounded to fewer digits, as under tf32=True. Measured, since torch has
    several switches for it, whose names depend on the version."""
    matrix = (0.7 * torch.arange(128.0 * 128)).sin().view(128, 128)
    exact, there = matrix.double() @ matrix.double(), matrix.to(device)
    error = torch.mm(there, there).cpu().double() - exact
    return float(error.norm() / exact.norm()) > 1e-5
