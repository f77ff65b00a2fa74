"""Which keeper decodes a batch: the best that pays and is exact, and what a run says about the others."""

import logging

import pytest

from grpo_plus.rollout import Rollouts, prefix
from grpo_plus.rollout.graphs import Graphed
from tests.packing.models import tiny
from tests.rollout.generating import SAMPLED, assert_equal, batch, config, generated


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


def told(model, caplog, batches=2, may_time=True):
    """What the log says about a run whose tokens are transformers' own."""
    run, inputs = Rollouts(insists=True, may_time=may_time), batch(padded=True)
    expected = generated(model, inputs, generation_config=config(**SAMPLED))
    with caplog.at_level(logging.INFO, logger="grpo_plus"):
        for _ in range(batches):
            assert_equal(generated(model, inputs, run, generation_config=config(**SAMPLED)), expected)
    return [record.getMessage() for record in caplog.records if record.name == "grpo_plus"]


def test_short_prompts_are_copied_for_their_rows(model, caplog):
    assert told(model, caplog) == ["generation: each prompt once (4x fewer), finished rows leave, cache in place"]


def test_long_prompts_are_kept_once(model, caplog, monkeypatch):
    monkeypatch.setitem(prefix.LEAST_SAVED, "cpu", 0)
    assert told(model, caplog) == [
        "generation: each prompt once (4x fewer), finished rows leave, one cache of each prompt"
    ]


def test_prompts_are_copied_where_attention_to_shared_prompts_is_not_exact(model, caplog, monkeypatch):
    monkeypatch.setitem(prefix.LEAST_SAVED, "cpu", 0)
    exact = prefix.shared_attention
    monkeypatch.setattr(prefix, "shared_attention", lambda *args, **kwargs: 1.1 * exact(*args, **kwargs))
    first, second = told(model, caplog)
    assert first.startswith(
        "generation: not with one cache of each prompt. one cache of each prompt is not exact on Qwen3"
    )
    assert second == "generation: each prompt once (4x fewer), finished rows leave, cache in place"


def test_prompts_are_copied_where_layers_hold_more_than_keys_and_values(caplog, monkeypatch):
    monkeypatch.setitem(prefix.LEAST_SAVED, "cpu", 0)
    first, second = told(tiny("lfm2"), caplog)
    assert "not with one cache of each prompt. a cache with LinearAttentionLayer" in first
    assert second == "generation: each prompt once (4x fewer), finished rows leave, cache in place"


def test_no_graph_is_chosen_where_the_clock_may_not_choose(model, caplog, monkeypatch):
    monkeypatch.setattr(Graphed, "pays", classmethod(lambda cls, model, prompts, length: True))
    assert told(model, caplog, may_time=False) == [
        "generation: each prompt once (4x fewer), finished rows leave, cache in place"
    ]


def test_a_graph_that_fails_is_told_once_and_later_batches_do_without(model, caplog, monkeypatch):
    tried = []

    def fails(call):
        tried.append(call)
        raise RuntimeError("out of streams")

    monkeypatch.setattr(Graphed, "pays", classmethod(lambda cls, model, prompts, length: True))
    monkeypatch.setattr(Graphed.__init__, "__defaults__", (fails,))
    assert told(model, caplog, batches=3) == [
        "generation: each prompt once (4x fewer), finished rows leave, CUDA graphs",
        "generation: not with CUDA graphs. a CUDA graph failed: RuntimeError: out of streams.",
        "generation: each prompt once (4x fewer), finished rows leave, cache in place",
    ]
    assert len(tried) == 1
