import pytest
import torch
from torch import Tensor

from grpo_plus.losses import REDUCTIONS, average, reduce
from tests.close import assert_close

LOSS = [[1.0, 2.0, 100.0], [3.0, 4.0, 5.0]]
MASK = [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token-mean", 3.0),  # (1 + 2 + 3 + 4 + 5) / 5
        ("global-token-mean", 1.5),  # 15 / 10
        ("seq-mean-token-mean", 2.75),  # (3/2 + 12/3) / 2
        ("seq-mean-token-sum", 7.5),  # (3 + 12) / 2
        ("seq-mean-token-sum-norm", 1.875),  # (3 + 12) / (2 * 4)
    ],
)
def test_a_loss_per_token(how, expected: float):
    reduced = reduce(torch.tensor(LOSS), torch.tensor(MASK), how, num_items=10, max_length=4)
    assert_close("loss", reduced, torch.tensor(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token-mean", 1.6),  # (1 * 2 + 2 * 3) / 5
        ("global-token-mean", 0.8),  # 8 / 10
        ("seq-mean-token-mean", 1.5),  # (1 + 2) / 2
        ("seq-mean-token-sum", 4.0),  # 8 / 2
        ("seq-mean-token-sum-norm", 1.0),  # 8 / (2 * 4)
    ],
)
def test_a_loss_per_sequence_counts_once_per_token(how, expected: float):
    reduced = reduce(torch.tensor([[1.0], [2.0]]), torch.tensor(MASK), how, num_items=10, max_length=4)
    assert_close("loss", reduced, torch.tensor(expected), rtol=1e-6)


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3), (1, 1)])
@pytest.mark.parametrize("hidden", [1.0, float("nan"), float("inf")])
def test_nothing_to_count_gives_zero_and_no_gradient(how, shape, hidden: float):
    loss = torch.full(shape, hidden, requires_grad=True)
    reduced = reduce(loss, torch.zeros(shape), how, num_items=torch.tensor(0), max_length=4)
    reduced.backward()
    assert reduced == 0
    assert torch.equal(gradient_of(loss), torch.zeros(shape))


@pytest.mark.parametrize("how", REDUCTIONS)
def test_an_empty_row_keeps_the_others(how):
    loss = torch.tensor([[float("nan"), 2.0], [3.0, 5.0]], requires_grad=True)
    reduced = reduce(loss, torch.tensor([[0, 0], [1, 1]]), how, num_items=2, max_length=2)
    reduced.backward()
    expected = 8.0 / {"token-mean": 2, "global-token-mean": 2, "seq-mean-token-sum": 2}.get(how, 4)
    assert_close("loss", reduced, torch.tensor(expected), rtol=1e-6)
    assert gradient_of(loss)[0].tolist() == [0, 0]
    assert (gradient_of(loss)[1] == expected / 8.0).all()


@pytest.mark.parametrize(
    ("how", "name"), [("global-token-mean", "num_items"), ("seq-mean-token-sum-norm", "max_length")]
)
def test_a_missing_divisor_is_named(how, name: str):
    with pytest.raises(ValueError, match=f"{how}' divides by {name}, which is None"):
        reduce(torch.tensor(LOSS), torch.tensor(MASK), how)


def test_an_unknown_reduction_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'tokenmean'\. Did you mean 'token-mean'"):
        reduce(torch.tensor(LOSS), torch.tensor(MASK), "tokenmean")  # type: ignore[arg-type]


def test_a_metric_is_averaged_over_tokens_or_over_rows():
    mask = torch.tensor(MASK)
    assert average(torch.tensor(LOSS), mask) == 3.0
    assert average(torch.tensor([[1.0], [2.0]]), mask) == 1.5
    assert average(torch.zeros(0, 1), torch.zeros(0, 3)) == 0


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
