"""Which trained weights are not finite, and whether gradients are."""

import pytest
import torch
from torch import nn

from grpo_plus.models.finite import gradients_are_finite, nonfinite_weights


def layers(*sizes: tuple[int, ...]) -> nn.Module:
    model = nn.Module()
    for index, size in enumerate(sizes):
        model.register_parameter(f"w{index}", nn.Parameter(torch.ones(size)))
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_that_are_not_finite_are_named(value, dtype):
    model = layers((2, 3), (4,), (5,)).to(dtype)
    assert nonfinite_weights(model) == []
    model.w1.data[3] = value
    assert nonfinite_weights(model) == ["w1"]


def test_a_frozen_weight_is_looked_at_on_request():
    model = layers((2,), (3,))
    model.w0.data[0] = torch.nan
    model.w0.requires_grad_(False)
    assert nonfinite_weights(model) == []
    assert nonfinite_weights(model, frozen_too=True) == ["w0"]


def test_large_numbers_are_finite():
    model = layers((2,)).double()
    model.w0.data[:] = 1e300  # neither the square nor the float32 of it is
    model.w0.grad = torch.full((2,), 1e100, dtype=torch.float64)
    assert nonfinite_weights(model) == []
    assert gradients_are_finite(model)


def test_a_gradient_whose_square_is_infinite_is_not_finite():
    model = layers((2,))
    model.w0.grad = torch.full((2,), 1e20)  # Adam's second moment would be infinite from then on
    assert not gradients_are_finite(model)


def test_an_empty_part_of_a_weight_is_finite():
    model = layers((0,), (3, 0), (2,))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    assert nonfinite_weights(model) == []
    assert gradients_are_finite(model)
    model.w2.data[0], model.w2.grad[0] = torch.nan, torch.nan
    assert nonfinite_weights(model) == ["w2"]
    assert not gradients_are_finite(model)


def test_the_part_that_zero_3_leaves_on_this_process_is_looked_at():
    model = layers((0,))
    model.w0.ds_tensor = torch.tensor([1.0, torch.nan])
    assert nonfinite_weights(model) == ["w0"]


def test_a_model_without_gradients_has_finite_ones():
    assert gradients_are_finite(layers((2,)))
    assert gradients_are_finite(nn.Module())


def test_one_nan_among_the_gradients_is_found():
    model = layers((2,), (3,), (1,))
    model.w0.grad, model.w2.grad = torch.ones(2), torch.tensor([torch.nan])
    assert not gradients_are_finite(model)
