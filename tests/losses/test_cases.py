import pytest
import torch

from grpo_plus.losses import LOSSES, LossInputs, policy_loss
from tests.close import assert_close
from tests.losses.cases import CASES, MAX_LENGTH, NEW, NUM_ITEMS, Case, double, inputs_of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_worked_example(case: Case):
    logps = double(NEW).requires_grad_()
    result = policy_loss(
        case.loss,
        inputs_of(case, logps),
        case.keywords,
        loss_reduction=case.reduction,
        num_items=NUM_ITEMS,
        max_length=MAX_LENGTH,
        **case.kl,
    )
    result.loss.backward()
    assert_close("loss", result.loss, double(case.expected), rtol=1e-6)
    assert_close("gradient", logps.grad, double(case.gradient), rtol=1e-6)


def test_every_loss_has_a_worked_example():
    assert {case.loss for case in CASES} == set(LOSSES)


def test_the_worked_example_of_the_definitive_guide():
    # Rewards .9, .7, .4 with the population std, probabilities .35, .45, .20 over .30, .40, .30, clip .2: terms
    # 1.3248, .1825, -1.0382 (min of the products, as its numbers; its formula min(r, clip) A gives .2090).
    inputs = LossInputs(
        double([[0.35], [0.45], [0.20]]).log(),
        double([[0.30], [0.40], [0.30]]).log(),
        double([[1.1355499479], [0.1622214211], [-1.2977713690]]),
        torch.ones(3, 1),
    )
    objective = -policy_loss("grpo", inputs).loss - 0.1 * 0.05
    assert_close("objective", objective, double(0.1513627), rtol=1e-5)
