"""DPPO: which tokens the trust region stops, and what it is centered on."""

import math

import pytest
import torch
from torch import Tensor

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses import LOSSES, LossInputs, policy_loss
from tests.close import assert_close
from tests.engine import install_engine
from tests.training import make_trainer

DPPO = ["dppo_tv", "dppo_kl"]


def probabilities(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def gradient_of(loss: str, new: Tensor, advantages: Tensor, **given) -> Tensor:
    logps = new.log().requires_grad_()
    keywords = given.pop("keywords", {})
    inputs = LossInputs(logps, advantages=advantages, mask=torch.ones(new.shape), **given)
    policy_loss(loss, inputs, keywords, num_items=1.0).loss.backward()
    assert logps.grad is not None
    return logps.grad


@pytest.mark.parametrize("loss", DPPO)
def test_a_rare_token_goes_on_and_a_probable_one_is_stopped_unlike_under_ppos_clip(loss):
    # The paper's two tokens: 1e-4 to 1e-2 has a ratio of 100, .99 to .80 one of .81.
    given = {"advantages": torch.tensor([[1.0, -1.0]]), "old_logps": probabilities([1e-4, 0.99]).log()}
    new = probabilities([1e-2, 0.80])
    ppo = gradient_of("dapo", new, keywords={"epsilon": 0.2}, **given)
    dppo = gradient_of(loss, new, **given)
    assert (ppo != 0).tolist() == [[False, True]]
    assert dppo.tolist() == [[pytest.approx(-20.0), 0.0]]  # the ratio of 100, truncated
    assert gradient_of(loss, new, keywords={"c": math.inf}, **given)[0, 0].item() == pytest.approx(-100.0)


@pytest.mark.parametrize("loss", DPPO)
def test_a_token_that_moves_back_keeps_its_gradient_however_far_it_is(loss):
    given = {"advantages": torch.tensor([[-1.0, 1.0]]), "old_logps": probabilities([0.1, 0.9]).log()}
    assert gradient_of(loss, probabilities([0.8, 0.2]), **given).tolist() == [pytest.approx([8.0, -2 / 9])]


@pytest.mark.parametrize("loss", DPPO)
def test_the_trust_region_lies_around_what_sampled(loss):
    # The policy has not moved from .5 since the batch was scored, but the sampler gave the first token .2: it is stopped.
    # For the last token the sampler has no value. Were the losses multiplied by the ratio, the second would have 3.
    given = {
        "advantages": torch.ones(1, 3),
        "old_logps": probabilities([0.5, 0.5, 0.5]).log(),
        "sampling_logps": probabilities([0.2, 0.48, math.nan]).log(),
        "importance_sampling_ratio": torch.full((1, 3), 3.0),
    }
    gradient = gradient_of(loss, probabilities([0.5, 0.5, 0.5]), **given)
    assert_close("gradient", gradient, probabilities([0.0, -0.5 / 0.48, -1.0]), rtol=1e-12)


def test_the_kl_is_taken_under_what_sampled():
    # .95 ln(.95/.85) + .05 ln(.05/.15) = .0507; from the policy it would be .85 ln(.85/.95) + .15 ln(.15/.05) = .0702.
    given = {"advantages": -torch.ones(1, 1), "old_logps": probabilities([0.95]).log()}
    for delta, stops in ((0.05, True), (0.052, False)):
        gradient = gradient_of("dppo_kl", probabilities([0.85]), keywords={"delta": delta}, **given)
        assert (gradient.item() == 0) is stops


def stopped_by_the_paper(kind: str, new: float, sampled: float, advantage: float, delta: float) -> bool:
    """Eq. 12 to 14, one token at a time, from probabilities."""
    tv = abs(new - sampled)
    kl = sampled * math.log(sampled / new) + (1 - sampled) * math.log((1 - sampled) / (1 - new))
    away = new > sampled if advantage > 0 else new < sampled
    return away and (tv if kind == "dppo_tv" else kl) > delta


@pytest.mark.parametrize("loss", DPPO)
def test_the_mask_is_the_papers_on_random_tokens(loss):
    generator = torch.Generator().manual_seed(0)
    new, sampled = torch.rand(2, 8, 25, generator=generator, dtype=torch.float64).clamp(0.001, 0.999)
    advantages = torch.randn(8, 25, generator=generator, dtype=torch.float64)
    gradient = gradient_of(loss, new, advantages, old_logps=torch.zeros(8, 25).double(), sampling_logps=sampled.log())
    delta = LOSSES[loss].keywords["delta"]
    tokens = zip(*(values.flatten().tolist() for values in (new, sampled, advantages)), strict=True)
    weights = [0.0 if stopped_by_the_paper(loss, *token, delta) else min(token[0] / token[1], 20.0) for token in tokens]
    assert 20 < weights.count(0.0) < 180
    assert_close("gradient", gradient, -torch.tensor(weights, dtype=torch.float64).view(8, 25) * advantages, rtol=1e-9)


@pytest.mark.parametrize("loss", DPPO)
@pytest.mark.parametrize(("new", "sampled"), [(0.0, 0.0), (0.0, -1.0), (-1.0, 0.0), (1e-7, -1e-7), (-1e-9, -80.0)])
def test_probabilities_of_one_and_next_to_none_are_told_apart(loss, new, sampled):
    logps = torch.tensor([[new]], requires_grad=True)
    inputs = LossInputs(logps, torch.tensor([[sampled]]), torch.tensor([[1.0]]), torch.ones(1, 1))
    result = policy_loss(loss, inputs, num_items=1.0)
    result.loss.backward()
    assert logps.grad is not None
    far = abs(math.exp(new) - math.exp(sampled)) > 0.1
    rose = far and new > sampled
    assert logps.grad.item() == pytest.approx(0.0 if rose else -math.exp(new - sampled), rel=1e-5)
    assert result.metrics["clip_ratio/high_mean"].item() == rose


@pytest.mark.parametrize("loss", DPPO)
@pytest.mark.parametrize("keywords", [{"delta": -0.1}, {"delta_high": math.nan}, {"c": 1.0}])
def test_a_region_that_cannot_be_is_refused(loss, keywords):
    with pytest.raises(ValueError, match="must be 0 or more, and c above 1"):
        gradient_of(loss, probabilities([0.5]), torch.ones(1, 1), old_logps=torch.zeros(1, 1), keywords=keywords)


class Watched(GRPOPlusTrainer):
    def policy_loss(self, inputs, **options):
        self.seen = inputs
        return super().policy_loss(inputs, **options)


@pytest.mark.newest_trl
def test_the_samplers_own_log_probabilities_reach_the_loss(tmp_path, monkeypatch, recwarn):
    install_engine(monkeypatch)
    made = make_trainer(
        tmp_path, trainer_class=Watched, config_class=GRPOPlusConfig, use_vllm=True, loss_type="dppo_tv", max_steps=1
    )
    # The ratio to the sampler is not 1, so this is not `reinforce`.
    assert not [warning for warning in recwarn if "has the gradient of 'reinforce'" in str(warning.message)]
    made.train()
    seen = made.seen
    differences = (seen.logps - seen.sampling_logps)[seen.mask].detach()
    known = ~differences.isnan()
    assert 0 < (~known).sum() < known.sum()  # the engine has no value for one token of each completion
    assert 0.1 < differences[known].std() < 0.3  # and is off by 0.2 elsewhere
    assert_close("behavior", seen.behavior_logps, seen.sampling_logps.where(known_of(seen), seen.old_logps), rtol=1e-12)


def known_of(inputs: LossInputs) -> Tensor:
    assert inputs.sampling_logps is not None
    return ~inputs.sampling_logps.isnan()
