"""What every loss promises, over the whole registry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_plus.losses import LOSSES, REDUCTIONS, LossInputs, policy_loss, reduce
from tests.close import assert_close

every_loss = pytest.mark.parametrize("name", LOSSES)

# Settings that make a loss say something on small random inputs.
KEYWORDS: dict[str, dict] = {
    # All tokens of the band, so that nothing is left to chance, and few would be in its own band of 1 to 5. Not from 0:
    # the only token of a batch has a covariance of 0, give or take a rounding.
    "clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 100.0},
    # Its own bounds of 3e-4 clip nearly every token of these inputs.
    "gspo_token": {"epsilon": 0.1, "epsilon_high": 0.1},
}
# Their gradient is not the derivative of their value: a part of it is detached.
REWEIGHTED = ["cispo", "cispo_two_sided", "dppo_kl", "dppo_tv", "reinforce", "topr", "vespo"]
DETACHED = {*REWEIGHTED, "gspo_token"}


def promising(promise: str):
    return pytest.mark.parametrize("name", [name for name in LOSSES if getattr(LOSSES[name], promise)])


@st.composite
def batches(draw, max_rows: int = 4, per_token: bool | None = None, off_policy: float = 0.3) -> dict[str, Tensor]:
    """LossInputs' fields in float64: up to 4 rows of 1 to 7 tokens, masks of any kind, rows without tokens."""
    rows, tokens = draw(st.integers(1, max_rows)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    per_token = draw(st.booleans()) if per_token is None else per_token

    def normal(columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    logps = -normal(tokens).abs()
    return {
        "logps": logps,
        "old_logps": logps + off_policy * normal(tokens),
        "advantages": normal(tokens if per_token else 1),
        "mask": torch.rand(rows, tokens, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.0])),
        "ref_logps": logps + 0.2 * normal(tokens),
    }


def token_loss(name: str, batch: dict[str, Tensor]):
    return LOSSES[name].function(LossInputs(**batch), **KEYWORDS.get(name, {}))


def loss_and_gradient(name: str, batch: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    logps = batch["logps"].clone().requires_grad_()
    options = {"num_items": 11.0, "max_length": 8, **options}
    loss = policy_loss(name, LossInputs(**{**batch, "logps": logps}), KEYWORDS.get(name), **options).loss
    loss.backward()
    assert logps.grad is not None
    return loss.detach(), logps.grad


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in DETACHED])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@settings(max_examples=20)
@given(batch=batches())
def test_the_gradient_is_the_derivative(name: str, beta: float, batch: dict[str, Tensor]):
    def loss(logps: Tensor) -> Tensor:
        inputs = LossInputs(**{**batch, "logps": logps})
        return policy_loss(name, inputs, KEYWORDS.get(name), beta=beta, num_items=11.0, max_length=8).loss

    assert torch.autograd.gradcheck(loss, batch["logps"].clone().requires_grad_())


@pytest.mark.parametrize("name", REWEIGHTED)
@given(batch=batches())
def test_a_reweighted_loss_is_linear_in_the_log_probabilities(name: str, batch: dict[str, Tensor]):
    # With the weight held fixed the loss is -w A log-prob, so its gradient times log-prob is the loss itself.
    loss, gradient = loss_and_gradient(name, batch)
    assert_close("loss", (gradient * batch["logps"]).sum(), loss, rtol=1e-9)


@given(batch=batches(per_token=False))
def test_gspo_token_is_gspo_for_one_advantage_per_row(batch: dict[str, Tensor]):
    logps = batch["logps"].clone().requires_grad_()
    keywords = {"importance_sampling_level": "sequence", "epsilon": 0.1}
    gspo = policy_loss("grpo", LossInputs(**{**batch, "logps": logps}), keywords).loss
    gspo.backward()
    loss, gradient = loss_and_gradient("gspo_token", batch)
    assert_close("loss", loss, gspo, rtol=1e-9)
    assert_close("gradient", gradient, logps.grad, rtol=1e-9)


@every_loss
@given(batch=batches(), garbage=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
def test_what_the_mask_hides_has_no_influence(name: str, batch: dict[str, Tensor], garbage: float):
    mask = batch["mask"]
    counts = {tuple(mask.shape): mask, (len(mask), 1): mask.any(-1, keepdim=True)}
    spoiled = {field: values.where(counts[tuple(values.shape)], garbage) for field, values in batch.items()}
    spoiled["mask"] = mask
    for options in ({}, {"beta": 0.1}):
        loss, gradient = loss_and_gradient(name, batch, **options)
        spoiled_loss, spoiled_gradient = loss_and_gradient(name, spoiled, **options)
        assert torch.equal(loss, spoiled_loss)
        assert torch.equal(gradient, spoiled_gradient)
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=10)
@given(batch=batches(), columns=st.integers(1, 3))
def test_padding_changes_nothing(name: str, reduction, batch: dict[str, Tensor], columns: int):
    tokens = batch["mask"].shape[1]
    padded = {
        field: values if values.shape[1] == 1 < tokens else torch.nn.functional.pad(values.double(), (0, columns))
        for field, values in batch.items()
    }
    loss, gradient = loss_and_gradient(name, batch, loss_reduction=reduction)
    padded_loss, padded_gradient = loss_and_gradient(name, padded, loss_reduction=reduction)
    assert_close("loss", padded_loss, loss, rtol=1e-9)
    assert_close("gradient", padded_gradient[:, :tokens], gradient, rtol=1e-9)


@every_loss
@given(batch=batches(), seed=st.integers(0, 1000))
def test_permuting_the_rows_permutes_the_losses(name: str, batch: dict[str, Tensor], seed: int):
    order = torch.randperm(len(batch["logps"]), generator=torch.Generator().manual_seed(seed))
    result = token_loss(name, batch)
    permuted = token_loss(name, {field: values[order] for field, values in batch.items()})
    assert_close("loss", permuted.loss, result.loss[order], rtol=1e-9)
    for metric, values in result.metrics.items():
        assert_close(metric, permuted.metrics[metric], values[order], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].scope == "row"])
@given(batch=batches())
def test_a_row_does_not_see_the_others(name: str, batch: dict[str, Tensor]):
    result = token_loss(name, batch).loss
    rows = ({field: values[row : row + 1] for field, values in batch.items()} for row in range(len(result)))
    alone = [token_loss(name, row).loss for row in rows]
    assert_close("loss", torch.cat(alone), result, rtol=1e-12)


@promising("zero_without_advantage")
@given(batch=batches())
def test_a_row_without_advantage_has_no_gradient(name: str, batch: dict[str, Tensor]):
    advantages = batch["advantages"].clone()
    advantages[0] = 0.0
    _, gradient = loss_and_gradient(name, {**batch, "advantages": advantages})
    assert (gradient[0] == 0).all()


def test_kl_to_old_pulls_a_row_without_advantage_back():
    # log-ratio .3: gradient of k3 times .04
    batch = {
        "logps": torch.full((1, 1), -0.7).double(),
        "old_logps": torch.full((1, 1), -1.0).double(),
        "advantages": torch.zeros(1, 1).double(),
        "mask": torch.ones(1, 1),
    }
    _, gradient = loss_and_gradient("kl_to_old", batch)
    assert_close("gradient", gradient, 0.04 * (1 - torch.full((1, 1), -0.3).double().exp()), rtol=1e-9)


@promising("reinforce_on_policy")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=10)
@given(batch=batches(per_token=False, off_policy=0.0))
def test_on_policy_the_gradient_is_that_of_reinforce(name: str, reduction, batch: dict[str, Tensor]):
    _, expected = loss_and_gradient("reinforce", batch, loss_reduction=reduction)
    _, gradient = loss_and_gradient(name, batch, loss_reduction=reduction)
    assert_close("gradient", gradient, expected, rtol=1e-9)


@promising("reinforce_by_token")
@settings(max_examples=10)
@given(batch=batches(per_token=True, off_policy=0.0))
def test_on_policy_the_gradient_is_that_of_reinforce_token_by_token(name: str, batch: dict[str, Tensor]):
    _, expected = loss_and_gradient("reinforce", batch, loss_reduction="token-mean")
    _, gradient = loss_and_gradient(name, batch, loss_reduction="token-mean")
    assert_close("gradient", gradient, expected, rtol=1e-9)


@every_loss
@pytest.mark.parametrize("distance", [-200.0, -30.0, 30.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_log_ratio_that_overflows_leaves_finite_gradients(name: str, distance: float, advantage: float):
    # exp(200) is infinite in float32, and the gradient of a clipped infinity would be 0 * inf.
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    old_logps = torch.stack([logps[0] - distance, logps[1]])
    inputs = LossInputs(logps, old_logps, torch.tensor([[advantage], [0.5]]), torch.ones(2, 3))
    # The KL to the old policy is really e^200 there, and so is its gradient.
    keywords = {"beta_old": 0.0} if name == "kl_to_old" else KEYWORDS.get(name)
    policy_loss(name, inputs, keywords, num_items=6.0, max_length=3).loss.backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@given(batch=batches(), c=st.sampled_from([1.3, 2.0, 3.0]))
def test_dual_clip_is_delta_by_another_name(batch: dict[str, Tensor], c: float):
    batch = {**batch, "old_logps": batch["logps"] + 3 * (batch["old_logps"] - batch["logps"])}
    dual = LOSSES["dual_clip"].function(LossInputs(**batch), c=c).loss
    delta = LOSSES["grpo"].function(LossInputs(**batch), delta=c).loss
    assert_close("loss", dual, delta, rtol=1e-12)


def test_clip_cov_drops_the_share_it_was_told_to():
    # 40 tokens in the band of which 10 % of 40 are dropped; which ones, chance decides.
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(4, 10, generator=generator).double()
    inputs = LossInputs(logps, logps, torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.ones(4, 10))
    keywords = {"clip_cov_ratio": 0.1, "clip_cov_lb": -1e9, "clip_cov_ub": 1e9}
    draws = [LOSSES["clip_cov"].function(inputs, **keywords).metrics["clip_cov/dropped_mean"] for _ in range(50)]
    assert {int(dropped.sum()) for dropped in draws} == {4}
    assert (torch.stack(draws).sum(0) > 0).sum() > 30


def test_gmpo_weighs_token_advantages_by_one_ratio():
    # log-ratios .2, -.1, mean .05; advantages 1, 3: -(1 + 3) / 2 e^.05
    inputs = LossInputs(
        torch.tensor([[-0.8, -1.1]]), torch.full((1, 2), -1.0), torch.tensor([[1.0, 3.0]]), torch.ones(1, 2)
    )
    loss = LOSSES["gmpo"].function(inputs).loss
    assert_close("loss", reduce(loss, inputs.mask, "seq-mean-token-mean"), -2 * torch.tensor(0.05).exp(), rtol=1e-6)


def test_only_three_losses_promise_less():
    # The tests above are parametrized over the promises: a loss that drops one would escape them silently.
    names = ("scope", "zero_without_advantage", "reinforce_on_policy", "reinforce_by_token")
    promises = {name: tuple(getattr(LOSSES[name], promise) for promise in names) for name in LOSSES}
    kept = ("row", True, True, True)
    assert {name: promise for name, promise in promises.items() if promise != kept} == {
        "clip_cov": ("batch", True, False, False),
        "gmpo": ("row", True, True, False),
        "kl_to_old": ("row", False, True, False),
    }
