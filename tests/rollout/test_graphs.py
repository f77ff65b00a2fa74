"""Steps of fixed shapes give what the model gives, and a graph that fails, errs or is slow is not used.

A CPU has no graphs. Stand-ins take the place of the recording, which is an argument for this reason.
"""

import weakref
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from grpo_plus.rollout import fixed, graphs
from grpo_plus.rollout.fixed import Bucket
from grpo_plus.rollout.graphs import EAGER_STEPS, Graphed, SelfMeasured
from tests.packing.models import tiny
from tests.rollout.ending import generated, kept_by

CPU = torch.device("cpu")


@pytest.fixture
def small_buckets(monkeypatch):
    """A rollout of twelve tokens meets several buckets: its cache grows twice, and its rows leave."""
    monkeypatch.setattr(fixed, "COLUMNS", 4)
    monkeypatch.setattr(fixed, "LEAST_STEPS", 2)
    monkeypatch.setattr(graphs, "LEAST_STEPS", 2)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt_oss", "gpt2", "qwen3_moe"])
def test_steps_of_fixed_shapes_give_transformers_tokens_and_random_state(name, small_buckets):
    model, keepers = tiny(name), []
    # A stand-in for a recording computes what the memory holds then, as a replay does.
    loop = kept_by(partial(Graphed, record=lambda call: call), keepers)
    found = generated(model, padded=True, custom_generate=loop)
    expected = generated(model, padded=True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert keepers[0].cache.layers[0].keys.shape[::2] == (2, 36)  # it began with 8 rows and 28 columns


def test_a_bucket_has_a_power_of_two_rows_and_room_for_more_steps():
    assert Bucket.of(1, 10) == Bucket(1, 256)
    assert Bucket.of(5, 240) == Bucket(8, 256)
    assert Bucket.of(8, 241) == Bucket(8, 512)
    assert Bucket.of(33, 1000) == Bucket(64, 1024)


def test_a_recording_that_fails_is_told_and_not_tried_again(small_buckets):
    model, keepers, tried = tiny("qwen3"), [], []

    def fails(call):
        tried.append(call)
        raise RuntimeError("operation not permitted when stream is capturing")

    found = generated(model, padded=True, custom_generate=kept_by(partial(Graphed, record=fails), keepers))
    assert torch.equal(found[0], generated(model, padded=True)[0])
    assert keepers[0].failure == "a CUDA graph failed: RuntimeError: operation not permitted when stream is capturing"
    assert len(tried) == 1


def measured(recorded, calls=EAGER_STEPS + 3):
    """Calls that a function and its recording get, and why the recording is not used."""
    made = []

    def call():
        made.append("eager")
        return torch.ones(3)

    def replay():
        made.append("replay")
        return recorded()

    step = SelfMeasured(call, lambda call: replay, CPU)
    results = [step() for _ in range(calls)]
    assert all(torch.equal(result, torch.ones(3)) for result in results)
    return made, step.failure


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass at each look at the clock: an eager step takes 5, and a replay what the test says."""
    times = iter([])

    def set_clock(*seconds):
        nonlocal times
        ticks = [0.0]
        for second in seconds:
            ticks += [ticks[-1] + second, ticks[-1] + second]
        times = iter(ticks)

    monkeypatch.setattr(graphs, "perf_counter", lambda: next(times))
    return set_clock


def test_a_graph_that_is_right_and_faster_is_used(clock):
    clock(5, 5, 4, 4)
    made, failure = measured(lambda: torch.ones(3))
    assert made == ["eager"] * (EAGER_STEPS + 2) + ["replay"] * 4
    assert failure is None


def test_a_graph_that_is_slower_is_not_used(clock):
    clock(5, 5, 6, 6)
    made, failure = measured(lambda: torch.ones(3))
    assert made[-2:] == ["eager", "eager"]
    assert failure == "a CUDA graph takes 6 s, the step that it replaces 5 s"


@pytest.mark.parametrize("wrong", [1.01, torch.nan])
def test_a_graph_with_other_logits_is_not_used(clock, wrong):
    clock(5, 5, 4, 4)
    made, failure = measured(lambda: torch.full((3,), wrong))
    assert made[-2:] == ["eager", "eager"]
    assert failure.startswith("a CUDA graph gives other logits")


def test_after_a_rollout_no_graph_is_held(clock):
    clock(*[5, 5, 4, 4] * 9)
    model, keepers, replays = tiny("qwen3"), [], []

    def record(call):
        replay = partial(call)
        replays.append(weakref.ref(replay))
        return replay

    generated(model, padded=False, custom_generate=kept_by(partial(Graphed, record=record), keepers))
    assert keepers[0].failure is None
    assert {replay() for replay in replays} == {None}


def test_graphs_are_off_and_need_attention_that_takes_a_mask():
    model = tiny("qwen3")
    cache = DynamicCache(config=model.config)
    assert not Graphed.pays(model, None, 10**6)
    assert Graphed.why_not(model, cache) is None
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in Graphed.why_not(model, cache)
