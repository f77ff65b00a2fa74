"""NaN-aware means and spreads over one axis: the only place where an epsilon meets a standard deviation.

NaN marks a completion that no reward function judged. It takes part in no mean and no spread, and stays NaN.
Statistics run over the last axis and keep it, so that they broadcast against what they were computed from. `weights`,
of the values' shape, say how often an entry counts: a completion's tokens, for statistics over tokens. `cosine` alone
compares two whole vectors.
"""

import torch
from torch import Tensor

# TRL hands rewards over in float32, where three weights that should sum to 0.7 land within a few units of the last
# place of each other. A spread below that resolution is rounding, and dividing by it would amplify it to |A| near 1.
RESOLUTION = 4 * torch.finfo(torch.float32).eps


def count(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """How many entries are not NaN, as float: (..., n) -> (..., 1)."""
    judged = (~values.isnan()).to(values.dtype)
    return (judged if weights is None else judged * weights).sum(-1, keepdim=True)


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of the entries that are not NaN; NaN where there is none: (..., n) -> (..., 1)."""
    if weights is None:
        return values.nanmean(-1, keepdim=True)
    return (values * weights).nansum(-1, keepdim=True) / count(values, weights)


def rounding(values: Tensor) -> Tensor:
    """The largest difference that float32 rounding of the entries can explain: (..., n) -> (..., 1)."""
    return RESOLUTION * values.abs().nan_to_num().amax(-1, keepdim=True)


def has_spread(values: Tensor) -> Tensor:
    """Whether the entries differ by more than float32 rounding of the largest: (..., n) -> (..., 1) bool.

    The test is relative, because the rounding is: eight rewards of 0.7 have a float32 std of 6e-8, not of 0.
    """
    judged = ~values.isnan()
    low = values.where(judged, torch.inf).amin(-1, keepdim=True)
    high = values.where(judged, -torch.inf).amax(-1, keepdim=True)
    return (high - low) > rounding(values)


def centre(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Subtract the mean; exactly 0 where there is no spread; NaN stays NaN: (..., n) -> (..., n)."""
    centred = values - mean(values, weights)
    return centred.where(has_spread(values) | values.isnan(), 0.0)


def others(values: Tensor) -> Tensor:
    """For each entry all the others, itself replaced by NaN: (..., n) -> (..., n, n)."""
    itself = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return values.unsqueeze(-2).masked_fill(itself, torch.nan)


def centre_on_others(values: Tensor) -> Tensor:
    """Subtract the mean of the other entries: n/(n−1) · (x − mean), 0 for a single one: (..., n) -> (..., n)."""
    return centre(values) * count(values) / (count(values) - 1).clamp(min=1)


def std(values: Tensor, *, ddof: int = 1, weights: Tensor | None = None) -> Tensor:
    """Standard deviation of the entries that are not NaN; exactly 0 where there is no spread: (..., n) -> (..., 1).

    Args:
        ddof: 1 for the sample std (Bessel's correction, as TRL and verl), 0 for the population std.
        weights: how often each entry counts; once where None.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof!r} is not a standard deviation. Use 1 (sample) or 0 (population).")
    squares = centre(values, weights).square()
    total = (squares if weights is None else squares * weights).nansum(-1, keepdim=True)
    return (total / (count(values, weights) - ddof).clamp(min=1)).sqrt()


def divide(values: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """values / (scale + eps), and exactly 0 where the scale is 0; NaN stays NaN."""
    check_eps(eps)
    return (values / (scale + eps)).where((scale > 0) | values.isnan(), 0.0)


def check_eps(eps: float) -> None:
    """Raise ValueError for an eps that is no small number to add to a std."""
    if not 0 <= eps < torch.inf:
        raise ValueError(f"eps={eps!r} is negative or infinite. Use 0 or a small positive number such as 1e-4.")


def zscore(values: Tensor, *, ddof: int = 1, eps: float, weights: Tensor | None = None) -> Tensor:
    """Centre and scale: (x − mean) / (std + eps), exactly 0 where there is no spread: (..., n) -> (..., n)."""
    return divide(centre(values, weights), std(values, ddof=ddof, weights=weights), eps=eps)


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of the angle between two vectors (n,), in float64; NaN where one of them is 0."""
    first, second = first.double(), second.double()
    scale = first.norm() * second.norm()
    return (first @ second / scale).item() if scale > 0 else float("nan")
