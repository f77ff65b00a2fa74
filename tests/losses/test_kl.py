import pytest
import torch
from torch import Tensor

from grpo_plus.losses import AdaptiveBeta, LossInputs
from grpo_plus.losses.kl import k1, k2, k3, kl_to_reference
from tests.close import assert_close

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.2]).double()
REFERENCE = torch.tensor([0.0, -0.5, 0.2, 0.9, -0.6]).double().log_softmax(-1)


def exact_kl_gradient() -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    logps = logits.log_softmax(-1)
    (logps.exp() * (logps - REFERENCE)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def expected_gradient(estimator, ratio) -> Tensor:
    """Gradient of the estimate as a loss, in expectation over tokens that the present policy draws."""
    logits = LOGITS.clone().requires_grad_()
    logps = logits.log_softmax(-1)[:, None]  # one row per token of the vocabulary
    inputs = LossInputs(logps, logps.detach(), torch.zeros(5, 1), torch.ones(5, 1), REFERENCE[:, None])
    probabilities = logps.detach().exp()
    (probabilities * kl_to_reference(inputs, estimator, ratio)).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator):
    logps = LOGITS.log_softmax(-1)
    exact = (logps.exp() * (logps - REFERENCE)).sum()
    assert_close("kl", (logps.exp() * estimator(logps, REFERENCE)).sum(), exact, rtol=1e-12)


def test_the_estimators_by_hand():
    # log-ratio ln 2: ln 2, (ln 2)^2 / 2, 1/2 + ln 2 - 1
    logp, ref = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert_close("k1", k1(logp, ref), torch.tensor(0.69314718), rtol=1e-6)
    assert_close("k2", k2(logp, ref), torch.tensor(0.24022651), rtol=1e-6)
    assert_close("k3", k3(logp, ref), torch.tensor(0.19314718), rtol=1e-6)


@pytest.mark.parametrize(("estimator", "ratio"), [("k1", "token"), ("k3", "token"), ("k2", None)])
def test_these_have_the_gradient_of_the_kl(estimator, ratio):
    assert_close("gradient", expected_gradient(estimator, ratio), exact_kl_gradient(), rtol=1e-9)


def test_k1_without_a_ratio_has_no_gradient():
    assert expected_gradient("k1", None).abs().max() < 1e-12


def test_k3_without_a_ratio_has_the_gradient_of_the_reverse_kl():
    # d/dlogits KL(ref || policy) = policy - ref
    expected = LOGITS.softmax(-1) - REFERENCE.exp()
    assert_close("gradient", expected_gradient("k3", None), expected, rtol=1e-9)


def test_a_sequence_ratio_is_broadcast_over_the_tokens():
    # mean log-ratio (.4 + 0) / 2, k1 of the tokens .1 and -.3
    inputs = LossInputs(
        torch.tensor([[-1.0, -2.0]]),
        torch.tensor([[-1.4, -2.0]]),
        torch.zeros(1, 1),
        torch.ones(1, 2),
        torch.tensor([[-1.1, -1.7]]),
    )
    expected = torch.tensor([[0.1, -0.3]]) * torch.tensor(0.2).exp()
    assert_close("kl", kl_to_reference(inputs, "k1", "sequence"), expected, rtol=1e-6)


def test_missing_reference_log_probabilities_are_named():
    with pytest.raises(ValueError, match=r"needs LossInputs\.ref_logps, which is None"):
        kl_to_reference(LossInputs(*torch.zeros(3, 1, 1), torch.ones(1, 1)))


def test_an_unknown_estimator_suggests_the_nearest():
    inputs = LossInputs(*torch.zeros(3, 1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"Unknown kl_estimator 'k4'.*Known: k1, k2, k3"):
        kl_to_reference(inputs, "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.05)),  # 10 % above, 500 of 10 000 completions
        (60.0, 0.1 * (1 + 0.2 * 0.05)),  # clipped to 20 %
        (0.0, 0.1 * (1 - 0.2 * 0.05)),
        (float("inf"), 0.1 * (1 + 0.2 * 0.05)),
    ],
)
def test_adaptive_beta_moves_towards_its_target(kl: float, beta: float):
    start = AdaptiveBeta(beta=0.1, target_kl=6.0)
    assert start.update(kl, completions=500).beta == pytest.approx(beta, rel=1e-12)
    assert start.beta == 0.1


@pytest.mark.parametrize(("kl", "factor"), [(0.0, 0.8), (60.0, 1.2)])
def test_a_step_beyond_the_horizon_changes_beta_by_a_fifth_at_most(kl: float, factor: float):
    # Without a bound 1 - 0.2 * 512 / 64 would make it negative.
    assert AdaptiveBeta(beta=0.1, target_kl=6.0, horizon=64).update(kl, 512).beta == pytest.approx(0.1 * factor)


def test_adaptive_beta_finds_the_target_of_a_policy_that_answers_to_it():
    controller = AdaptiveBeta(beta=1.0, target_kl=0.05, horizon=100)
    for _ in range(200):
        controller = controller.update(kl=0.01 / controller.beta, completions=10)
    assert 0.01 / controller.beta == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("field", [{"beta": 0.0}, {"target_kl": -1.0}, {"horizon": 0}, {"beta": float("nan")}])
def test_adaptive_beta_refuses_what_cannot_move(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be positive"):
        AdaptiveBeta(**{"beta": 0.1, "target_kl": 6.0, **field})


def test_adaptive_beta_refuses_nan():
    with pytest.raises(ValueError, match="kl=nan"):
        AdaptiveBeta(0.1, 6.0).update(float("nan"))
