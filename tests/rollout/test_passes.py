"""What prompts begin with goes through the model once, and the tokens stay those of transformers' own loop."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from grpo_plus.models.caches import CACHE
from grpo_plus.rollout import Prompts, Rollouts, decode, passes, steps
from grpo_plus.rollout.graphs import Graphed
from grpo_plus.rollout.passes import Pass, passes_of, prefill
from grpo_plus.rollout.prefix import SharedPrompts
from tests.launches import Launches, launches_per_layer
from tests.packing.models import CONFIGS, HYBRIDS, VOCABULARY, tiny
from tests.rollout.generating import SAMPLED, assert_equal, config, generated

SYSTEM, GROUPS, WRITTEN = 6, (20, 15, 25), (3, 5, 7, 9)  # tokens: of all, of each group, of each row of a group
# 13 distinct rows, of which a group has 4 and one is alone. In one pass the longest has 40 tokens. In three passes:
# 1 and 1 beginnings of 6 tokens, 4 of 25, and 13 rests of 9.
IN_ONE, IN_THREE = 13 * 40, 6 + 4 * 25 + 13 * 9
WINDOWS = {"mistral", "gemma2", "gemma3", "gpt_oss", "phimoe"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiny prompts are worth a pass."""
    monkeypatch.setitem(passes.LEAST_SAVED, "cpu", 8)


def batch() -> dict[str, Tensor]:
    """Prompts of a later turn (14, 40): the system's, the group's, and what the row and its tool have written."""
    generator = torch.Generator().manual_seed(3)

    def drawn(tokens: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (tokens,), generator=generator).tolist()

    system = drawn(SYSTEM)
    rows = [prompt + drawn(n) for prompt in [system + drawn(tokens) for tokens in GROUPS] for n in WRITTEN]
    rows += [rows[-1], system + drawn(3)]  # two equal rows, and a row without a group
    longest = max(map(len, rows))
    padded = torch.tensor([[-1] * (longest - len(row)) + row for row in rows])
    return {"input_ids": padded.clamp(min=0), "attention_mask": (padded >= 0).long()}


def of(*rows: str) -> Pass:
    """A pass of rows with a token for each digit."""
    return Pass(tuple(torch.tensor([int(digit) for digit in row], dtype=torch.long) for row in rows))


def shown(found: tuple[Pass, ...]) -> list[tuple[list[str], tuple[int, ...]]]:
    return [(["".join(map(str, row.tolist())) for row in one.rows], one.parents) for one in found]


def test_prompts_are_cut_where_fewest_tokens_go_through_the_model(monkeypatch):
    # One pass: 4 rows of 8, 32 tokens. Cut at 111122 and 111133: 2 rows of 6 and 4 of 2, 20 tokens. Cut at 1111: 4 and
    # 4 rows of 4, 20 tokens, too, but beginnings of 6 can be cut again: 4 and 2 rows of 2, 8 tokens in place of 12.
    prompts = of("1111225", "1111336", "11112277", "1111338").rows
    rests = ["5", "6", "77", "8"], (0, 1, 0, 1)
    monkeypatch.setitem(passes.LEAST_SAVED, "cpu", 4)
    assert shown(passes_of(prompts, "cpu")) == [(["1111"], ()), (["22", "33"], (0, 0)), rests]
    monkeypatch.setitem(passes.LEAST_SAVED, "cpu", 5)
    assert shown(passes_of(prompts, "cpu")) == [(["111122", "111133"], ()), rests]
    monkeypatch.setitem(passes.LEAST_SAVED, "cpu", 13)
    assert passes_of(prompts, "cpu") == ()


@pytest.mark.parametrize("rows", [("12", "34"), ("1234",), ("1", "12345678", "12345679"), ("", "1")])
def test_prompts_without_a_beginning_to_share_take_one_pass(rows):
    assert passes_of(of(*rows).rows, "cpu") == ()


def test_every_prompt_comes_together_again(monkeypatch):
    monkeypatch.setitem(passes.LEAST_SAVED, "cpu", 1)
    generator, depths = torch.Generator().manual_seed(0), set()
    for _ in range(100):
        bits = torch.randint(2, (9, 9), generator=generator)
        lengths = torch.randint(2, 9, (9,), generator=generator).tolist()
        prompts = of(
            *{"".join(map(str, row.tolist()))[:length] for row, length in zip(bits, lengths, strict=True)}
        ).rows
        found = passes_of(prompts, "cpu")
        depths.add(len(found))
        rows = list(found[0].rows)
        for one in found[1:]:
            rows = [torch.cat([rows[parent], rest]) for parent, rest in zip(one.parents, one.rows, strict=True)]
        assert [row.tolist() for row in rows] == [row.tolist() for row in prompts]
        assert min(len(row) for one in found for row in one.rows) > 0
        assert sum(one.tokens for one in found) < Pass(prompts).tokens
    assert depths == {2, 3}


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {*HYBRIDS, "mpt"}))
def test_tokens_and_generator_state_are_those_of_transformers(name):
    """Also with a window that is just longer than 40 columns of prompts."""
    model = tiny(name, **({"sliding_window": 41} if name in WINDOWS else {})).train(name != "phimoe")
    expected = generated(model, batch(), generation_config=config(**SAMPLED))
    found = generated(model, batch(), Rollouts(insists=True), generation_config=config(**SAMPLED))
    assert_equal(found, expected)
    assert found.statistics[0].prefilled == IN_THREE


def in_passes(kind: Any, keepers: list[Any]) -> Any:
    """A loop for `custom_generate` with a keeper."""

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        prompts = Prompts.of(input_ids, kwargs["attention_mask"])
        keepers.append(kind(model, kwargs[CACHE]))
        found = passes_of(prompts.tokens, "cpu")
        assert len(found) == 3
        return decode(model, input_ids, prompts=prompts, keeper=keepers[-1], passes=found, **kwargs)[0]

    return loop


@pytest.mark.parametrize("kind", [SharedPrompts, partial(Graphed, record=lambda call: call)])
def test_steps_of_every_keeper_go_on_from_the_passes(kind):
    model, keepers = tiny("qwen3"), []
    arguments = {"generation_config": config(**SAMPLED)}
    expected = generated(model, batch(), **arguments)
    assert_equal(generated(model, batch(), custom_generate=in_passes(kind, keepers), **arguments), expected)
    assert len(keepers) == 1


REFUSED = {
    "mistral": "a sliding window would count the padding between a beginning and a rest",
    "lfm2": "a cache with LinearAttentionLayer does not hold keys and values alone",
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_padding_within_a_row_counts_each_prompt_takes_one_pass(name, caplog):
    caplog.set_level(logging.INFO, logger="grpo_plus")
    # As long as the columns of prompts, a window drops the first of them.
    model = tiny(name, **({"sliding_window": 40} if name in WINDOWS else {}))
    ours = Rollouts(insists=True)
    expected = generated(model, batch(), generation_config=config(**SAMPLED))
    for _ in range(2):
        found = generated(model, batch(), ours, generation_config=config(**SAMPLED))
        assert_equal(found, expected)
        assert found.statistics[0].prefilled == IN_ONE
    said = [record.message for record in caplog.records if "one pass" in record.message]
    assert said == [f"generation: each prompt in one pass. {REFUSED[name]}."]


def test_passes_that_are_not_exact_are_not_taken(caplog, monkeypatch):
    def swapped(model: Any, found: tuple[Pass, ...], arguments: dict[str, Any]) -> Any:
        *before, last = found
        return prefill(model, (*before, Pass(last.rows, last.parents[::-1])), arguments)

    caplog.set_level(logging.INFO, logger="grpo_plus")
    monkeypatch.setattr(steps, "prefill", swapped)
    model = tiny("qwen3")
    found = generated(model, batch(), Rollouts(insists=True), generation_config=config(**SAMPLED))
    assert_equal(found, generated(model, batch(), generation_config=config(**SAMPLED)))
    assert found.statistics[0].prefilled == IN_ONE
    assert "a prefill in passes is not exact on Qwen3ForCausalLM: logits differ by" in caplog.text


def test_prompts_padded_on_the_right_take_one_pass(caplog):
    caplog.set_level(logging.INFO, logger="grpo_plus")
    inputs, model = batch(), tiny("qwen3")
    inputs["attention_mask"][0, -1] = 0
    expected = generated(model, inputs, generation_config=config(**SAMPLED))
    assert_equal(generated(model, inputs, Rollouts(insists=True), generation_config=config(**SAMPLED)), expected)
    assert "a prompt ends with padding" in caplog.text


def test_the_log_says_once_how_many_fewer_tokens(caplog):
    caplog.set_level(logging.INFO, logger="grpo_plus")
    ours = Rollouts(insists=True)
    for _ in range(2):
        generated(tiny("qwen3"), batch(), ours, generation_config=config(**SAMPLED))
    said = [record.message for record in caplog.records if "begin with" in record.message]
    assert said == [f"generation: what prompts begin with goes through once ({IN_ONE / IN_THREE:.3g}x fewer tokens)"]


def test_launches_of_a_layer_in_two_passes():
    def launches(layers: int, found: tuple[Pass, ...]) -> int:
        model = tiny("qwen3", num_hidden_layers=layers)
        arguments = {CACHE: DynamicCache(config=model.config), "use_cache": True}
        with torch.no_grad(), Launches() as counted:
            prefill(model, found, arguments)
        return counted.counts.total()

    in_one = (of("1234", "1256"),)
    in_two = (of("12"), Pass(of("34", "56").rows, (0, 0)))
    # Two of them move keys and values together.
    assert launches_per_layer(partial(launches, found=in_one), (1, 2)) == 48 + 2
    # Two more copy the beginnings, and five are for a mask over keys of the pass before.
    assert launches_per_layer(partial(launches, found=in_two), (1, 2)) <= 2 * 48 + 2 + 2 + 5
