import pytest
import torch

from grpo_plus.losses import LossInputs
from grpo_plus.losses.ratios import clip, saturating_exp, sequence_ratio, token_ratio
from tests.close import assert_close

# Log-ratios .2, -.1 (and a masked one), .3, -.3, -.06.
INPUTS = LossInputs(
    torch.tensor([[-0.8, -1.1, 9.0], [-0.7, -1.3, -1.06]]),
    torch.full((2, 3), -1.0),
    torch.ones(2, 1),
    torch.tensor([[1, 1, 0], [1, 1, 1]]),
)


def test_the_ratios_of_tokens():
    expected = torch.tensor([[0.2, -0.1, 0.0], [0.3, -0.3, -0.06]]).exp()
    assert_close("ratio", token_ratio(INPUTS), expected, rtol=1e-6)


def test_the_ratio_of_a_sequence_counts_its_own_tokens():
    assert_close(
        "product", sequence_ratio(INPUTS, length_normalised=False), torch.tensor([[0.1], [-0.06]]).exp(), rtol=1e-6
    )
    assert_close("geometric mean", sequence_ratio(INPUTS), torch.tensor([[0.05], [-0.02]]).exp(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exp_stops_short_of_infinity(dtype: torch.dtype):
    log_ratio = torch.tensor([1e4, 1.0], dtype=dtype, requires_grad=True)
    ratio = saturating_exp(log_ratio)
    ratio.sum().backward()
    assert ratio.isfinite().all()
    assert ratio[0] > torch.finfo(dtype).max / 4
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == [0, ratio[1].item()]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.1, 1.0, -1.1, -1.0, 0, 0),
        (1.3, 1.0, -1.2, 0.0, 0, 1),  # far enough up
        (0.5, 1.0, -0.5, -1.0, 0, 0),  # down by mistake: the whole gradient
        (0.5, -1.0, 0.8, 0.0, 1, 0),  # far enough down
        (1.5, -1.0, 1.5, 1.0, 0, 0),  # up by mistake, within delta
        (4.0, -1.0, 3.0, 0.0, 0, 0),  # beyond delta
        (1.3, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_the_clip_case_by_case(ratio, advantage, loss, gradient, low, high):
    given = torch.tensor([[ratio]], requires_grad=True)
    result = clip(given, torch.tensor([[advantage]]), (0.8, 1.2), delta=3.0)
    result.loss.sum().backward()
    assert given.grad is not None
    assert result.loss.item() == pytest.approx(loss)
    assert given.grad.item() == pytest.approx(gradient)
    assert result.metrics["clip_ratio/low_mean"].item() == low
    assert result.metrics["clip_ratio/high_mean"].item() == high
    assert result.metrics["clip_ratio/region_mean"].item() == max(low, high)
