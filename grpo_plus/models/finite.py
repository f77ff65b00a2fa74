"""Whether the numbers of a model are finite: its weights, and their gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def nonfinite_weights(model: nn.Module, *, frozen_too: bool = False) -> list[str]:
    """Names of the trained weights that hold a NaN or an infinity. [] where all are finite.

    Where the weights are spread over processes, each process looks at its own parts: let all processes agree.

    Args:
        frozen_too: look at the weights that are not trained, too. The numbers of a quantized weight are not looked at.
    """
    named = model.named_parameters()
    weights = {name: _local(weight) for name, weight in named if weight.requires_grad or frozen_too}
    weights = {name: weight for name, weight in weights.items() if _has_numbers(weight)}
    if not weights:
        return []
    device = next(iter(weights.values())).device
    # One wait for the device, whatever the number of weights. A norm is fast, and may overflow where no number has.
    sound = torch.stack([_norm([weight]).isfinite().to(device) for weight in weights.values()]).tolist()
    suspects = [name for name, finite in zip(weights, sound, strict=True) if not finite]
    return [name for name in suspects if not weights[name].detach().isfinite().all()]


def gradients_are_finite(model: nn.Module) -> Tensor:
    """Whether the norm of the gradients that this process holds is finite, () bool on their device.

    It is not where a gradient is NaN or infinite, and where the squares overflow, which Adam would keep. Nothing waits
    for the answer.
    """
    gradients = [_local(weight.grad) for weight in model.parameters() if weight.grad is not None]
    return _norm(filter(_has_numbers, gradients)).isfinite()


def has_nonfinite_state(optimizer: Any) -> bool:
    """Whether a moment of the optimizer is NaN or infinite. False for an optimizer that shows no state."""
    states = getattr(optimizer, "state", None) or {}
    values = [value for state in states.values() if isinstance(state, dict) for value in state.values()]
    moments = [_local(value) for value in values if isinstance(value, Tensor) and _has_numbers(_local(value))]
    return any(not value.isfinite().all() for value in moments)


def _norm(values: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all values together, () on the device of the first; 0 of nothing."""
    return get_total_norm([value.detach() for value in values])


def _has_numbers(values: Tensor) -> bool:
    # A process may hold an empty part of a weight, and some norms of nothing are errors.
    return values.numel() > 0 and values.is_floating_point() and not values.is_meta


def _local(values: Any) -> Tensor:
    """This process's part of a weight that FSDP or ZeRO-3 has spread; the weight itself elsewhere."""
    values = getattr(values, "ds_tensor", values)
    return values.to_local() if hasattr(values, "to_local") else values
