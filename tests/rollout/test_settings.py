"""Settings of a generation under which the grouped loop gives what transformers' own loop gives."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.rollout import Rollouts, loop, rollouts
from tests.packing.counting import OnDevice
from tests.rollout.generating import EOS, PROMPT, SAMPLED, assert_equal, batch, config, generated


class Forced(LogitsProcessor):
    """Rows end after so many tokens, the first after `lengths[0]`, and none elsewhere."""

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self.ends = torch.tensor(lengths) + prompt - 1

    def __call__(self, ids, scores):
        end = self.ends == ids.shape[1]
        scores[:, EOS] = float("-inf")
        scores[end] = float("-inf")
        scores[end, EOS[0]] = 0.0
        return scores


class EndsAt(StoppingCriteria):
    """A row ends with a token of this kind, without an EOS."""

    def __call__(self, ids, scores, **_):
        return ids[:, -1] % 4 == 0


@pytest.fixture(scope="module")
def model():
    model = tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2, seed=5).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    return model


def both(model, inputs, own=None, **arguments):
    """What our loop gave, after a comparison with transformers'. `own` makes arguments that have a state."""
    arguments.setdefault("generation_config", config(**SAMPLED))
    expected = generated(model, inputs, **arguments, **(own() if own else {}))
    found = generated(model, inputs, Rollouts(insists=True), **arguments, **(own() if own else {}))
    assert_equal(found, expected)
    return found


def forced(inputs, lengths):
    return lambda: {"logits_processor": LogitsProcessorList([Forced(inputs["input_ids"].shape[1], lengths)])}


SETTINGS = {
    "one-eos": {"eos_token_id": 2},
    "min-new-tokens": {"min_new_tokens": 5},
    "suppressed": {"suppress_tokens": [7, 8, 2]},
    "forced-eos": {"forced_eos_token_id": 2, "eos_token_id": [2, 90]},
    "pad-is-eos": {"pad_token_id": 2, "eos_token_id": 2},
    "n-grams": {"no_repeat_ngram_size": 2, "min_p": 0.05},
    "copies": {"num_return_sequences": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_changes_nothing(model, settings):
    both(model, batch(padded=True), generation_config=config(**SAMPLED | settings))


def test_equal_prompts_need_not_lie_together(model):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    inputs = {name: value[order] for name, value in batch(padded=True).items()}
    assert both(model, inputs).statistics[0].prompts == 3


def test_without_a_shared_prompt_rows_still_leave(model):
    inputs = batch(padded=True, groups=4, rows=1)
    statistics = both(model, inputs, forced(inputs, [1, 9, 2, 4])).statistics[0]
    assert (statistics.prompts, statistics.steps, statistics.row_steps) == (4, 8, 8 + 3 + 1)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 20, 1], [2, 1, 3]], ids=["all-at-once", "one-goes-on", "in-turn"])
def test_rows_end_whenever_they_do(model, lengths):
    inputs = batch(padded=False, groups=1, rows=3)
    statistics = both(model, inputs, forced(inputs, lengths)).statistics[0]
    assert statistics.steps == min(max(lengths), 12) - 1
    assert statistics.new_tokens == sum(min(length, 12) for length in lengths)
    assert statistics.finished == sum(length < 12 for length in lengths)


def test_one_row_is_a_batch(model):
    both(model, batch(padded=False, groups=1, rows=1))


def test_stop_strings_end_rows(model):
    stops = StoppingCriteriaList([StopStringCriteria(tiny_tokenizer(), stop_strings=["a", "E", "0"])])
    found = both(model, batch(padded=True), stopping_criteria=stops)
    assert found.statistics[0].finished > both(model, batch(padded=True)).statistics[0].finished


def test_without_an_eos_a_row_goes_on_until_all_have_ended(model, monkeypatch):
    """transformers pads finished rows only where there is an EOS. Elsewhere their later tokens are part of the output."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    found = both(
        model,
        batch(padded=True),
        stopping_criteria=StoppingCriteriaList([EndsAt()]),
        generation_config=config(**SAMPLED, eos_token_id=None),
    )
    statistics = found.statistics[0]
    assert statistics.row_steps == statistics.steps * 12


def test_a_row_may_leave_a_step_late(model, monkeypatch):
    inputs = batch(padded=True)
    early = both(model, inputs).statistics[0]
    monkeypatch.setattr(rollouts, "decode", partial(loop.decode, late=True))
    late = both(model, inputs).statistics[0]
    assert (late.new_tokens, late.finished) == (early.new_tokens, early.finished)
    assert late.row_steps > early.row_steps


def test_the_host_waits_once_for_each_token(model, monkeypatch):
    monkeypatch.setattr(rollouts, "decode", partial(loop.decode, late=True))
    checked = Rollouts()
    generated(model, batch(padded=True), checked, generation_config=config(**SAMPLED))
    OnDevice.waits.clear()
    inputs = {name: value.as_subclass(OnDevice) for name, value in batch(padded=True).items()}
    found = generated(model, inputs, checked, generation_config=config(**SAMPLED))
    waits = [wait.partition(":")[0] for wait in OnDevice.waits]
    OnDevice.waits.clear()
    assert waits.count("cpu in prompts.py") == 1
    assert waits.count("tolist in sampling.py") == found.statistics[0].steps
    assert len(waits) == found.statistics[0].steps + 1


def test_the_model_sees_each_prompt_once_and_live_rows_only(model, monkeypatch):
    inputs, ours, seen = batch(padded=True), Rollouts(), []
    generated(model, inputs, ours, generation_config=config(**SAMPLED))  # with the self-check
    optimized = contextmanager(lambda self: (yield seen.append("decode")))  # where mixtures of experts change
    monkeypatch.setattr(type(model), "_optimize_model_for_decode", optimized)
    handle = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    statistics = generated(model, inputs, ours, generation_config=config(**SAMPLED)).statistics[0]
    handle.remove()
    prefill, decode, *steps = seen
    assert (prefill, decode) == ((3, PROMPT), "decode")
    assert [tokens for _, tokens in steps] == [1] * statistics.steps
    rows = [rows for rows, _ in steps]
    assert rows == sorted(rows, reverse=True)
    assert sum(rows) == statistics.row_steps < 12 * statistics.steps
