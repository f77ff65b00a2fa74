import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.kernels import linear_logprob as backends
from grpo_plus.kernels.linear_logprob import reference, single_pass, why_not
from tests.close import assert_close, differing
from tests.interpreter import INTERPRETED

FROZEN = ["torch", pytest.param("triton", marks=pytest.mark.triton)]
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 2.0, "logit_scale": 1.7, "temperature": 1.3},
]
EVERYTHING = OPTIONS[-1]
# N, H, V: from one tile, chunk and block to many of each, see `small_tiles`; a vocabulary of one token; odd ones.
SIZES = [(1, 2, 5), (4, 3, 1), (7, 5, 129), (9, 8, 333), (18, 16, 555), (3, 33, 64)]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(single_pass, "TILE_BYTES", 2000 * 4)
    monkeypatch.setattr(single_pass, "VOCAB_CHUNK", 64)
    monkeypatch.setattr(single_pass, "BLOCK_BYTES", {"cpu": 700 * 4})
    if INTERPRETED:
        from grpo_plus.kernels.linear_logprob import triton

        monkeypatch.setattr(triton, "ROWS", 16)
        monkeypatch.setattr(triton, "COLUMNS", 256)
        monkeypatch.setattr(triton, "DEFAULT_BLOCKS", triton.Blocks(128, 1))


@pytest.fixture
def linear_logprob(request):
    """The implementation of the parameter `linear_logprob`; "torch" where a test has none."""
    name = getattr(request, "param", "torch")
    return reference.linear_logprob if name == "reference" else backends.backend(name)


every_frozen = pytest.mark.parametrize("linear_logprob", FROZEN, indirect=True)
every = pytest.mark.parametrize("linear_logprob", ["reference", *FROZEN], indirect=True)


@pytest.fixture(autouse=True)
def poisoned(nan_from_torch_empty):
    pass


def head(
    count: int, width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a frozen weight and bias whose logits are a few units wide, and targets."""
    hidden = torch.randn(count, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (2 * torch.randn(vocab, width, dtype=torch.float64) / math.sqrt(width)).to(dtype)
    return hidden, weight, torch.randn(vocab, dtype=torch.float64).to(dtype), torch.randint(vocab, (count,))


def outputs(implementation, hidden, weight, targets, cotangent, **options) -> dict[str, Tensor]:
    """Log-probs, entropies, and the gradient of an arbitrary loss of the log-probs."""
    hidden = hidden.detach().requires_grad_()
    logps, entropy = implementation(hidden, weight, targets, **options)
    (logps * cotangent).sum().backward()
    assert not entropy.requires_grad
    return {"logps": logps, "entropy": entropy, "gradient": hidden.grad}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    for name in expected:
        assert_close(name, actual[name], expected[name], rtol=rtol)


@every
def test_two_tokens_by_hand(linear_logprob):
    # Logits 0 and ln 3 at temperature 1: probabilities 1/4 and 3/4. At temperature 1/2: 0 and 2 ln 3, 1/10 and 9/10.
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    for temperature, p in ((1.0, 0.75), (0.5, 0.9)):
        hidden.grad = None
        logps, entropy = linear_logprob(hidden, weight, torch.tensor([1]), temperature=temperature)
        logps.sum().backward()
        assert_close("logps", logps, torch.tensor([math.log(p)]), rtol=1e-6)
        assert_close("entropy", entropy, torch.tensor([-p * math.log(p) - (1 - p) * math.log(1 - p)]), rtol=1e-6)
        # W[1] - p W[1], divided by the temperature
        assert_close("gradient", hidden.grad, torch.tensor([[(1 - p) * math.log(3) / temperature, 0.0]]), rtol=1e-6)


@every_frozen
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS, ids=str)
def test_outputs_and_gradient_are_those_of_the_reference(small_tiles, linear_logprob, dtype, rtol, size):
    check(linear_logprob, dtype, rtol, size, EVERYTHING, with_bias=True)


@every_frozen
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS[1:3], ids=str)
def test_every_option_is_that_of_the_reference(small_tiles, linear_logprob, dtype, rtol, options, with_bias):
    check(linear_logprob, dtype, rtol, (5, 8, 333), options, with_bias=with_bias)


@every_frozen
def test_a_vocabulary_of_151936(linear_logprob):
    check(linear_logprob, torch.bfloat16, 1e-2, (2, 8, 151_936), {"temperature": 0.9}, with_bias=False)


def check(linear_logprob, dtype, rtol, size, options, *, with_bias):
    hidden, weight, bias, targets = head(*size, dtype)
    cotangent = torch.randn(size[0], dtype=torch.float64)
    bias = bias if with_bias else None
    expected = outputs(
        reference.linear_logprob,
        hidden.double(),
        weight.double(),
        targets,
        cotangent,
        bias=None if bias is None else bias.double(),
        **options,
    )
    actual = outputs(linear_logprob, hidden, weight, targets, cotangent, bias=bias, **options)
    assert actual["gradient"].dtype == dtype
    assert actual["logps"].dtype == actual["entropy"].dtype == torch.promote_types(dtype, torch.float32)
    same_dtype = outputs(reference.linear_logprob, hidden, weight, targets, cotangent, bias=bias, **options)
    for name, value in expected.items():
        error, own = (distance(run[name], value) for run in (actual, same_dtype))
        # Where most of a gradient cancels, no run in this dtype is close.
        assert error <= max(rtol, 2 * own), f"{name}: error {error:.1e}, of the reference {own:.1e}"


def distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / (expected.norm() or 1.0))


@pytest.mark.parametrize("linear_logprob", ["reference", "torch"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(small_tiles, linear_logprob, options):
    hidden, weight, bias, targets = head(5, 4, 77, torch.float64)
    assert torch.autograd.gradcheck(lambda h: linear_logprob(h, weight, targets, bias=bias, **options)[0], hidden)


def test_one_tile_and_many_are_the_same(monkeypatch, linear_logprob):
    hidden, weight, bias, targets = head(50, 16, 300)
    cotangent = torch.randn(50)
    one = outputs(linear_logprob, hidden, weight, targets, cotangent, bias=bias)
    for rows in (1, 7, 49):
        monkeypatch.setattr(single_pass, "TILE_BYTES", rows * 300 * 4)
        assert_all_close(outputs(linear_logprob, hidden, weight, targets, cotangent, bias=bias), one, 1e-6)


@every_frozen
def test_a_maximum_that_rises_and_falls_from_chunk_to_chunk(small_tiles, linear_logprob):
    # One hidden unit, so that a row's logits rise over the vocabulary, fall, or rise to the middle; the last by 200.
    slopes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [20.0, 0.0]])
    place = torch.linspace(-5, 5, 1000)
    weight, targets = torch.stack([place, -place.abs()], 1), torch.tensor([0, 999, 500, 10])
    cotangent = torch.ones(4)
    expected = outputs(reference.linear_logprob, slopes.double(), weight.double(), targets, cotangent)
    assert_all_close(outputs(linear_logprob, slopes, weight, targets, cotangent), expected, 1e-5)


def test_no_buffer_holds_more_than_a_tile(monkeypatch, nan_from_torch_empty, linear_logprob):
    monkeypatch.setattr(single_pass, "TILE_BYTES", 10 * 500 * 4)
    hidden, weight, _, targets = head(95, 4, 500)
    linear_logprob(hidden, weight, targets)
    assert max(nan_from_torch_empty) == 10 * 500


@pytest.mark.triton
def test_no_buffer_of_tritons_holds_more_than_a_tile(small_tiles, nan_from_torch_empty):
    hidden, weight, _, targets = head(20, 4, 500)
    backends.backend("triton")(hidden, weight, targets)
    assert max(nan_from_torch_empty) <= 16 * 256


@every_frozen
def test_a_nearly_certain_token_keeps_its_gradient_in_bf16(linear_logprob):
    # p(target) is about 0.9997: 1 - p rounds to 0 if p is rounded to bf16 before the subtraction.
    weight = torch.tensor([[8.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_logprob(hidden, weight, torch.tensor([0]))[0].sum().backward()
    rest = 1 / (1 + math.exp(8))
    assert_close("gradient", hidden.grad, torch.tensor([[8 * rest, -rest]]), rtol=1e-2)


@pytest.mark.triton
def test_in_float16_the_others_of_a_nearly_certain_token_keep_their_digits():
    # The others' probability, 3e-7, has three bits in float16. Relative to the largest of the others it has all.
    weight = torch.tensor([[64.0, 0.0], [0.0, 64.0]], dtype=torch.float16)
    hidden = torch.tensor([[0.234375, 0.0]], dtype=torch.float16, requires_grad=True)
    backends.backend("triton")(hidden, weight, torch.tensor([0]))[0].sum().backward()
    rest = 1 / (1 + math.exp(15))
    assert_close("gradient", hidden.grad, torch.tensor([[64 * rest, -64 * rest]]), rtol=2e-3)


@every_frozen
def test_advantages_per_token_and_ignored_positions(small_tiles, linear_logprob):
    hidden, weight, _, targets = head(12, 8, 333)
    advantages, mask = torch.randn(3, 4), torch.tensor([4, 1, 2])[:, None] > torch.arange(4)
    gradients = []
    for implementation in (linear_logprob, reference.linear_logprob):
        states = hidden.detach().view(3, 4, 8).requires_grad_()
        logps, _ = implementation(states[mask], weight, targets.view(3, 4)[mask])
        (advantages * torch.zeros(3, 4).masked_scatter(mask, logps)).sum().backward()
        gradients.append(states.grad)
    assert_close("gradient", *gradients, rtol=1e-5)
    assert not gradients[0][~mask].any()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens_still_give_a_gradient_of_zero(linear_logprob, dtype):
    hidden, weight, _, _ = head(4, 8, 30, dtype)
    kept = torch.zeros(4, dtype=torch.bool)
    logps, entropy = linear_logprob(hidden[kept], weight, torch.empty(0, dtype=torch.long))
    assert logps.shape == entropy.shape == (0,)
    logps.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


@every_frozen
@pytest.mark.parametrize("no_gradient", ["no_grad", "frozen"])
def test_without_a_gradient_the_second_product_is_left_out(monkeypatch, linear_logprob, no_gradient):
    hidden, weight, _, targets = head(9, 4, 50)
    expected = linear_logprob(hidden, weight, targets)
    for module in {single_pass.__name__, linear_logprob.__module__}:
        monkeypatch.setattr(f"{module}.add_product", lambda *_: pytest.fail("the derivatives were computed"))
    with torch.no_grad() if no_gradient == "no_grad" else nullcontext():
        actual = linear_logprob(hidden if no_gradient == "no_grad" else hidden.detach(), weight, targets)
    assert not actual[0].requires_grad
    names = ("logps", "entropy")
    assert differing(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True))) == []


@every_frozen
def test_backward_may_run_twice_and_leaves_the_inputs_alone(linear_logprob):
    hidden, weight, bias, targets = head(9, 4, 50)
    before = [tensor.detach().clone() for tensor in (hidden, weight, bias)]
    logps, _ = linear_logprob(hidden, weight, targets, bias=bias)
    (first,) = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(logps.sum(), hidden)
    assert torch.equal(first, second)
    names = ("hidden", "weight", "bias")
    assert differing(dict(zip(names, (hidden, weight, bias), strict=True)), dict(zip(names, before, strict=True))) == []


@every_frozen
def test_hidden_states_may_be_a_view(linear_logprob):
    _, weight, _, targets = head(12, 6, 40)
    strided = torch.randn(12, 12)[:, ::2]
    cotangent = torch.randn(12)
    expected = outputs(linear_logprob, strided.contiguous(), weight, targets, cotangent)
    views = (strided, weight.t().contiguous().t(), torch.stack([targets, targets], 1)[:, 0])
    assert_all_close(outputs(linear_logprob, *views, cotangent), expected, 1e-6)


# --- against TRL's own head


@pytest.fixture(scope="module")
def trls():
    """TRL's head on the tiny model, made afresh for each configuration."""
    from trl.trainer import add_fused_lm_head

    def make(dtype: torch.dtype, cast_lm_head_to_fp32: bool = False, temperature: float = 0.9, **config: float):
        torch.manual_seed(1)
        model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2)
        untied = nn.Linear(32, model.config.vocab_size, bias=False)
        model.set_output_embeddings(untied.requires_grad_(False))
        for name, value in config.items():
            setattr(model.config, name, value)
        model = model.to(dtype)
        add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs=("log_probs", "entropy"))
        return model

    return make


CONFIGS = [
    {},
    {"final_logit_softcapping": 1.5},
    {"logit_scale": 3.0},
    {"final_logit_softcapping": 0.5, "logit_scale": 2.0},
]


@every_frozen
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast", "cast_lm_head_to_fp32", "rtol"),
    [
        (torch.float32, False, False, 1e-5),
        (torch.bfloat16, False, False, 1e-2),
        (torch.float32, True, False, 1e-2),
        (torch.bfloat16, True, False, 1e-2),
        (torch.bfloat16, False, True, 1e-3),
        (torch.float32, True, True, 1e-5),
    ],
)
def test_outputs_and_gradients_are_those_of_trls_head(
    trls, linear_logprob, config, dtype, autocast, cast_lm_head_to_fp32, rtol
):
    model = trls(dtype, cast_lm_head_to_fp32, **config)
    input_ids = torch.randint(model.config.vocab_size, (2, 8))
    labels = input_ids.clone()
    labels[0, :4] = -100
    cotangent = torch.randn(2, 7)

    def trl():
        result = model(input_ids=input_ids, labels=labels, fused_lm_head=True)
        return result.log_probs, result.entropy

    def ours():
        mask = labels[:, 1:] != -100
        hidden = model.base_model(input_ids, use_cache=False).last_hidden_state[:, :-1][mask]
        lm_head = model.get_output_embeddings()
        assert why_not(lm_head) is None
        options = {"softcap": config.get("final_logit_softcapping"), "logit_scale": config.get("logit_scale", 1.0)}
        with torch.autocast("cpu", enabled=False) if cast_lm_head_to_fp32 else nullcontext():
            hidden = hidden.float() if cast_lm_head_to_fp32 else hidden
            result = linear_logprob(hidden, lm_head.weight, labels[:, 1:][mask], temperature=0.9, **options)
        return tuple(torch.zeros(mask.shape).masked_scatter(mask, values) for values in result)

    runs, hidden_states = [], []
    model.base_model.register_forward_hook(lambda _, __, output: hidden_states.append(output.last_hidden_state))
    for scores in (trl, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps, entropy = scores()
        (gradient,) = torch.autograd.grad((logps * cotangent).sum(), hidden_states[-1])
        runs.append({"logps": logps, "entropy": entropy, "gradient": gradient})
    # The forwards differ by the order of sums in float32 alone, also where the logits are bf16.
    assert_all_close(runs[1], runs[0] | {"gradient": runs[1]["gradient"]}, 1e-5)
    assert runs[1]["gradient"].dtype == dtype
    assert_close("gradient", runs[1]["gradient"], runs[0]["gradient"], rtol=rtol)


# --- what is refused


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked() -> nn.Linear:
    linear = nn.Linear(4, 9).requires_grad_(False)
    linear.register_forward_hook(lambda *_: None)
    return linear


def offloaded() -> nn.Linear:
    linear = nn.Linear(4, 9).requires_grad_(False)
    linear.forward = lambda x: x
    return linear


def quantized() -> nn.Linear:
    linear = nn.Linear(4, 9)
    linear.weight = nn.Parameter(torch.zeros(18, 1, dtype=torch.uint8), requires_grad=False)
    return linear


def biased() -> nn.Linear:
    linear = nn.Linear(4, 9)
    linear.weight.requires_grad_(False)
    return linear


def gathered() -> nn.Linear:
    linear = nn.Linear(4, 9).requires_grad_(False)
    linear.weight.data = torch.zeros(0)
    return linear


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(4, 9)), LoraConfig(target_modules=["0"]))
    return model.base_model.model[0]


REFUSED = [
    (lambda: nn.Linear(4, 9), "its weight and bias would get no gradient"),
    (biased, "its bias would get no gradient"),
    (lambda: Doubled(4, 9), "no plain nn.Linear but Doubled"),
    (lambda: nn.Identity(), "no plain nn.Linear but Identity"),
    (lora, "no plain nn.Linear but Linear with a forward of its own"),
    (offloaded, "a forward of its own"),
    (hooked, "has hooks"),
    (quantized, r"a Parameter of torch\.uint8"),
    (gathered, r"is not there \(shape \(0,\) on cpu\)"),
    (lambda: nn.Linear(4, 9, device="meta"), "on meta"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_a_head_that_will_not_do_is_told_why(make, reason):
    assert re.search(reason, why_not(make()) or "fits")


def test_a_frozen_linear_head_will_do():
    assert why_not(nn.Linear(4, 9).requires_grad_(False)) is None
    assert why_not(nn.Linear(4, 9, bias=False, dtype=torch.bfloat16).requires_grad_(False)) is None


@every_frozen
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 9), biased, quantized, gathered])
def test_the_operator_refuses_what_it_would_get_wrong(linear_logprob, make):
    linear = make()
    with pytest.raises(ValueError, match="The single-pass head cannot be used: its"):
        linear_logprob(torch.randn(2, 4), linear.weight, torch.tensor([0, 1]), bias=linear.bias)


@every_frozen
def test_a_trainable_head_may_be_scored_without_a_gradient(linear_logprob):
    linear = nn.Linear(4, 9)
    hidden, targets = torch.randn(2, 4), torch.tensor([0, 8])
    with torch.no_grad():
        logps, _ = linear_logprob(hidden, linear.weight, targets, bias=linear.bias)
    expected, _ = reference.linear_logprob(hidden, linear.weight, targets, bias=linear.bias)
    assert_close("logps", logps, expected, rtol=1e-6)
