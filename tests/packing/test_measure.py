"""The fastest of the exact ways, on a clock that the tests wind by hand."""

import math

import pytest
import torch

from grpo_plus.packing.measure import RUNS, Stopwatch, Way, in_words, timed_ways
from grpo_plus.packing.rows import PADDING_FREE, SEGMENTS


def head(model, hidden, targets):
    raise NotImplementedError


def times_of(costs, forms=(SEGMENTS, PADDING_FREE, None), heads=(None, head), own_layers=(True, False), scale=0.1):
    """Time the ways with these seconds: the sum of what the form, the head and the layers cost."""
    asked = []

    def seconds(way):
        asked.append(way)
        return scale * (costs[way.form] + costs.get(way.head, 0.0) + (costs["own"] if way.own_layers else 0.0))

    times = timed_ways(forms, heads, own_layers, seconds)
    assert len(asked) == len(set(asked))  # no way twice
    return times


def fastest(times):
    return min(times, key=times.__getitem__)


def test_the_other_head_and_the_other_layers_are_tried_on_the_fastest_form_alone():
    times = times_of({SEGMENTS: 3.0, PADDING_FREE: 2.0, None: 5.0, head: -0.5, "own": 0.25})
    assert fastest(times) == Way(PADDING_FREE, head, own_layers=False)
    assert Way(SEGMENTS, head, own_layers=True) not in times
    assert len(times) == 5


def test_trls_own_way_is_timed_and_wins_where_it_is_the_fastest():
    times = times_of({SEGMENTS: 3.0, PADDING_FREE: 2.0, None: 1.0, head: -0.5, "own": 0.25})
    assert fastest(times) == Way()


def test_padded_rows_may_have_our_layers_and_never_our_head():
    times = times_of({SEGMENTS: 3.0, PADDING_FREE: 2.0, None: 1.0, head: -0.5, "own": -0.25})
    assert fastest(times) == Way(None, None, own_layers=True)
    assert all(way.head is None for way in times if way.form is None)


def test_without_trls_way_among_the_candidates_the_fastest_form_wins():
    costs = {SEGMENTS: 3.0, PADDING_FREE: 2.0, None: 0.0, "own": 0.0}
    times = times_of(costs, forms=(SEGMENTS, PADDING_FREE), heads=(None,), own_layers=(False,))
    assert set(times) == {Way(SEGMENTS), Way(PADDING_FREE)}


def test_after_thirty_seconds_only_trls_own_way_is_timed():
    costs = {SEGMENTS: 11.0, PADDING_FREE: 1.0, None: 12.0, "own": 0.0}
    times = times_of(costs, scale=1.0)
    assert set(times) == {Way(SEGMENTS, None, own_layers=True), Way()}
    assert fastest(times) == Way(SEGMENTS, None, own_layers=True)


def nothing():
    pass


class Clock:
    """Seconds that pass only while a forward says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_cold_run_does_not_count_and_gradients_stay_as_they_are():
    clock, weight = Clock(), torch.ones(2, requires_grad=True)
    weight.grad = torch.tensor([7.0, 7.0])
    passing = iter([100.0, 3.0, 2.0])

    def forward():
        clock.now += next(passing)
        return weight * 2.0

    assert Stopwatch([weight], clock, prepare=nothing).seconds(forward) == 2.0
    assert next(passing, None) is None
    assert weight.grad.tolist() == [7.0, 7.0]
    assert RUNS == 3


def test_a_backward_takes_part_in_the_time():
    clock, weight = Clock(), torch.ones(2, requires_grad=True)

    def forward():
        values = weight * 2.0
        values.register_hook(lambda gradient: setattr(clock, "now", clock.now + 4.0))
        return values

    assert Stopwatch([weight], clock, prepare=nothing).seconds(forward) == 4.0


def test_a_way_without_enough_memory_takes_forever_and_another_failure_is_shown():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong():
        raise RuntimeError("shapes differ")

    stopwatch = Stopwatch([torch.ones(1, requires_grad=True)], Clock(), prepare=nothing)
    assert stopwatch.seconds(too_large) == math.inf
    with pytest.raises(RuntimeError, match="shapes differ"):
        stopwatch.seconds(wrong)


def test_the_words_name_the_ways_from_the_fastest_on_and_compare_with_trl():
    times = {Way(): 3.0, Way(SEGMENTS, None, True): 1.0, Way(SEGMENTS, head, True): math.inf, Way(PADDING_FREE): 6.0}
    assert in_words(times, "NVIDIA L4") == (
        "shared_prompt (segment attention), one-step LoRA layers 3.0x; TRL 1.0x; padding_free (segment attention) "
        "0.5x; shared_prompt (segment attention), single-pass head, one-step LoRA layers cannot run on NVIDIA L4"
    )
