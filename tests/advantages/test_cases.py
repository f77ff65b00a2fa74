import pytest
import torch

from grpo_plus.advantages import ESTIMATORS, estimate
from tests.advantages.cases import CASES, Case, rewards_of
from tests.close import assert_close


@pytest.mark.parametrize("case", CASES, ids=str)
def test_worked_example(case: Case):
    advantages = estimate(case.estimator, rewards_of(case.rewards, case.weights, case.lengths), case.keywords)
    assert_close("advantages", advantages, torch.tensor(case.expected, dtype=torch.float64), rtol=1e-6)


def test_every_estimator_has_a_worked_example():
    # Those of steps have theirs in test_process.py.
    assert {case.estimator for case in CASES} == {name for name in ESTIMATORS if not ESTIMATORS[name].needs_steps}
