"""NaN-aware means and spreads over one axis: the only place where an epsilon meets a standard deviation.

NaN marks a completion that no reward function judged. NaN enters no mean and no spread, and stays NaN.
Statistics run over the last axis and keep it as an axis of size 1, so that they broadcast against their input.
`weights` have the shape of the values and say how often each entry counts. For statistics over tokens, the weights are
the lengths of the completions. `cosine` alone compares two whole vectors.
"""

import torch
from torch import Tensor

# TRL hands over rewards in float32, where weighted sums that should all be 0.7 differ by a few units of the last place.
# A smaller spread than that is rounding, and a division by such a spread would amplify rounding to |A| near 1.
RESOLUTION = 4 * torch.finfo(torch.float32).eps


def count(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Number of entries that are not NaN, as float: (..., n) -> (..., 1)."""
    judged = (~values.isnan()).to(values.dtype)
    return (judged if weights is None else judged * weights).sum(-1, keepdim=True)


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of the entries that are not NaN: (..., n) -> (..., 1). NaN where all entries are NaN."""
    if weights is None:
        return values.nanmean(-1, keepdim=True)
    return (values * weights).nansum(-1, keepdim=True) / count(values, weights)


def rounding(values: Tensor) -> Tensor:
    """Largest difference that float32 rounding of the entries can explain: (..., n) -> (..., 1)."""
    return RESOLUTION * values.abs().nan_to_num().amax(-1, keepdim=True)


def has_spread(values: Tensor) -> Tensor:
    """Whether the entries differ by more than float32 rounding of the largest entry: (..., n) -> (..., 1) bool.

    The test is relative because rounding is relative. Eight rewards of 0.7 have a float32 std of 6e-8, not of 0. No
    entries at all have no spread.
    """
    if values.shape[-1] == 0:  # amin and amax refuse an empty axis
        return torch.zeros((*values.shape[:-1], 1), dtype=torch.bool, device=values.device)
    judged = ~values.isnan()
    low = values.where(judged, torch.inf).amin(-1, keepdim=True)
    high = values.where(judged, -torch.inf).amax(-1, keepdim=True)
    return (high - low) > rounding(values)


def center(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Subtract the mean: (..., n) -> (..., n). Exactly 0 where there is no spread. NaN stays NaN."""
    centered = values - mean(values, weights)
    return centered.where(has_spread(values) | values.isnan(), 0.0)


def others(values: Tensor) -> Tensor:
    """Copy all entries for each entry, with NaN in that entry's own place: (..., n) -> (..., n, n)."""
    itself = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return values.unsqueeze(-2).masked_fill(itself, torch.nan)


def center_on_others(values: Tensor) -> Tensor:
    """Subtract the mean of the other entries, n/(n−1) · (x − mean): (..., n) -> (..., n). A single entry gets 0."""
    return center(values) * count(values) / (count(values) - 1).clamp(min=1)


def std(values: Tensor, *, ddof: int = 1, weights: Tensor | None = None) -> Tensor:
    """Standard deviation of the entries that are not NaN: (..., n) -> (..., 1). Exactly 0 where there is no spread.

    Args:
        ddof: 1 for the sample std (Bessel's correction, as TRL and verl), 0 for the population std.
        weights: how often each entry counts. None counts each entry once.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof!r} is not a standard deviation. Use 1 (sample) or 0 (population).")
    squares = center(values, weights).square()
    total = (squares if weights is None else squares * weights).nansum(-1, keepdim=True)
    return (total / (count(values, weights) - ddof).clamp(min=1)).sqrt()


def divide(values: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Divide, values / (scale + eps). Exactly 0 where the scale is 0. NaN stays NaN."""
    check_eps(eps)
    return (values / (scale + eps)).where((scale > 0) | values.isnan(), 0.0)


def check_eps(eps: float) -> None:
    """Refuse, with a ValueError, an eps that is no small number to add to a std."""
    if not 0 <= eps < torch.inf:
        raise ValueError(f"eps={eps!r} is negative or infinite. Use 0 or a small positive number such as 1e-4.")


def zscore(values: Tensor, *, ddof: int = 1, eps: float, weights: Tensor | None = None) -> Tensor:
    """Center and scale, (x − mean) / (std + eps): (..., n) -> (..., n). Exactly 0 where there is no spread."""
    return divide(center(values, weights), std(values, ddof=ddof, weights=weights), eps=eps)


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of the angle between two vectors (n,), in float64; NaN where one of them is 0."""
    first, second = first.double(), second.double()
    scale = first.norm() * second.norm()
    return (first @ second / scale).item() if scale > 0 else float("nan")
