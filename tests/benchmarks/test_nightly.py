"""The nightly run on trainings that take no time: what learns too little or resumes as another run is found."""

import pytest
import torch

from benchmarks import nightly


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(nightly, "NUM_HELD_OUT", 2)
    monkeypatch.setattr(nightly.task, "correctness_reward", nightly.task.digits_reward)


@pytest.mark.parametrize(("before", "after", "holds"), [(0.05, 0.99, True), (0.05, 0.94, False), (0.2, 0.99, False)])
def test_a_demo_must_begin_with_few_right_answers_and_end_with_many(monkeypatch, before, after, holds):
    run = {"accuracy_before": before, "accuracy_after": after}
    monkeypatch.setattr(nightly.demo, "measure", lambda seed, estimator, qlora: run)
    monkeypatch.setattr(nightly, "resumed", lambda **_: nightly.Outcome("resumed", "", True))
    monkeypatch.setattr(nightly, "in_a_process", lambda *_: {"accuracy": {"0": 0.26, "16": 0.76}})
    assert [outcome.holds for outcome in nightly.outcomes(2, real=True)] == [holds, holds, True, True]


def test_a_run_that_is_taken_up_ends_as_the_one_that_nobody_stopped():
    assert nightly.resumed(seed=0, steps=2, warm_up_steps=1).holds


@pytest.mark.parametrize(
    ("stopped", "taken_up", "holds"),
    [
        (1.0, 2.0, True),
        (1.0, 2.5, False),
        (2.0, 2.0, False),  # it did not stop
    ],
)
def test_other_weights_are_found(monkeypatch, stopped, taken_up, holds):
    ends = iter([2.0, stopped, taken_up])
    monkeypatch.setattr(nightly, "_trained", lambda *_, **__: {"weight": torch.tensor(next(ends))})
    assert nightly.resumed(seed=0, steps=2, warm_up_steps=0).holds == holds
