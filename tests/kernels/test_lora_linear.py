import pytest
import torch
import torch.nn.functional as F

from grpo_plus.kernels.lora_linear import Base, lora_linear, reference
from tests.close import assert_close

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
SIZES = [((5,), 3, 7, 2), ((2, 9), 16, 4, 1), ((1, 1), 1, 1, 1), ((3, 2, 5), 33, 129, 8)]  # leading, in, out, r


@pytest.fixture(autouse=True)
def poisoned(nan_from_torch_empty):
    pass


def case(size, dtype=torch.float32, adapter=None, bias=True):
    leading, inputs, outputs, rank = size
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype) if bias else None
    base = Base(lambda x: F.linear(x, weight, bias), weight.to)
    x = torch.randn(*leading, inputs).to(dtype)
    a, b = (torch.randn(*shape).to(adapter or dtype) for shape in ((rank, inputs), (outputs, rank)))
    return x, base, a, b, torch.randn(*leading, outputs)


def run(implementation, x, base, a, b, cotangent, scaling=1.7):
    x, a, b = (tensor.detach().requires_grad_() for tensor in (x, a, b))
    y = implementation(x, base, a, b, scaling=scaling)
    y.backward(cotangent.to(y.dtype))
    return {"y": y, "x": x.grad, "a": a.grad, "b": b.grad}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS, ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "float32"])
def test_output_and_gradients_are_those_of_the_reference(size, dtype, rtol, adapter):
    x, base, a, b, cotangent = case(size, dtype, adapter)
    if adapter is not None and dtype == torch.float64:
        rtol = 1e-6
    expected = run(reference.lora_linear, x, base, a, b, cotangent)
    actual = run(lora_linear, x, base, a, b, cotangent)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert_close(name, actual[name], value, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_too(dtype):
    x, base, a, b, cotangent = case(SIZES[3], dtype, torch.float32)
    cast = torch.float16 if dtype == torch.float16 else torch.bfloat16
    with torch.autocast("cpu", cast):
        expected = run(reference.lora_linear, x, base, a, b, cotangent)
        actual = run(lora_linear, x, base, a, b, cotangent)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert_close(name, actual[name], value, rtol=1e-2)


def test_gradcheck():
    x, base, a, b, _ = case(((2, 3), 4, 5, 2), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, base, a, b, scaling=0.3), leaves)


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_what_needs_no_gradient_gets_none_and_the_others_theirs(frozen):
    x, base, a, b, cotangent = case(SIZES[1])
    expected = run(lora_linear, x, base, a, b, cotangent)
    leaves = {name: tensor.requires_grad_(name != frozen) for name, tensor in (("x", x), ("a", a), ("b", b))}
    lora_linear(x, base, a, b, scaling=1.7).backward(cotangent)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[name])


def test_without_gradients_the_output_is_the_same():
    x, base, a, b, cotangent = case(SIZES[2])
    with torch.no_grad():
        y = lora_linear(x, base, a, b, scaling=1.7)
    assert torch.equal(y, run(lora_linear, x, base, a, b, cotangent)["y"])


def test_no_tokens_give_gradients_of_zero():
    x, base, a, b, cotangent = case(((0,), 3, 7, 2))
    result = run(lora_linear, x, base, a, b, cotangent)
    assert result["y"].shape == (0, 7)
    assert not result["a"].any()
    assert not result["b"].any()


def test_the_input_may_be_a_view_and_is_left_alone():
    x, base, a, b, cotangent = case(SIZES[1])
    strided = torch.stack([x, x], -1)[..., 0]
    before = strided.clone()
    expected, actual = (run(lora_linear, tensor, base, a, b, cotangent) for tensor in (x, strided))
    for name, value in expected.items():
        assert_close(name, actual[name], value, rtol=1e-6)
    assert torch.equal(strided, before)
