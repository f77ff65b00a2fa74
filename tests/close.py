from collections.abc import Mapping

import torch
from torch import Tensor


def assert_close(name: str, actual: Tensor, expected: Tensor, *, rtol: float) -> None:
    """Relative RMS error; absolute where the expected values are all zero. Names the tensor and the worst entry."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs()
    scale = expected.square().mean().sqrt()
    error = difference.square().mean().sqrt() / (scale if scale > 0 else 1.0)
    worst = difference.flatten().argmax()
    assert error <= rtol, (
        f"{name}: relative error {error:.2e} > {rtol:.0e}; worst entry {int(worst)}: "
        f"{actual.flatten()[worst]} for {expected.flatten()[worst]}"
    )


def differing(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not, to the bit, what is expected."""
    return [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])]


def rewards_tensor(values: list) -> Tensor:
    """(P, G) or (P, G, K) nested lists, None for an abstaining function, as TRL's float32."""
    tensor = torch.tensor(_none_to_nan(values), dtype=torch.float32).double()
    return tensor.unsqueeze(-1) if tensor.dim() == 2 else tensor


def _none_to_nan(values):
    if isinstance(values, list):
        return [_none_to_nan(value) for value in values]
    return float("nan") if values is None else values
