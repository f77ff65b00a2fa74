"""The longest completion on each card, and the settings that the table compares."""

import json
from dataclasses import replace

import pytest

from benchmarks import longest as benchmark
from benchmarks.memory_run import TRL_DEFAULT, TRL_TUNED
from grpo_plus.planner import QLORA, Run, longest, longest_table, plan, shape_of
from grpo_plus.planner.changes import EXACT, leanest
from grpo_plus.planner.constants import GIB
from grpo_plus.planner.longest import CHUNKED, LEANEST, TUNED, setups
from tests.planner.configs import QWEN3_4B
from tests.test_docs import DOCS

QWEN = shape_of(QWEN3_4B)
CARDS = [8 * GIB, 24 * GIB]


@pytest.fixture(scope="module")
def found():
    return longest(QWEN, Run(**QLORA), CARDS)


def test_each_length_fits_and_one_more_token_does_not(found):
    for one in found:
        for card, tokens in zip(CARDS, one.tokens, strict=True):
            assert plan(QWEN, replace(one.run, max_completion_length=tokens)).fits(card)
            assert not plan(QWEN, replace(one.run, max_completion_length=tokens + 1)).fits(card)


def test_trl_is_planned_with_the_settings_that_the_benchmarks_run():
    compared = setups(Run(**QLORA))
    assert compared["TRL, its defaults"] == Run(**TRL_DEFAULT)
    tuned = Run(**TRL_TUNED, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert compared[TUNED] == tuned
    assert compared[CHUNKED] == replace(tuned, generation_chunk_size=1)


def test_every_setting_has_the_runs_prompts_and_completions_per_step():
    run = Run(per_device_train_batch_size=12, gradient_accumulation_steps=2, num_generations=6, prompt_length=900)
    for one in setups(run).values():
        assert (one.generation_rows, one.num_generations, one.prompt_length) == (24, 6, 900)
        assert one.lora_r is None
        assert one.dtype == "float32"  # trained weights stay in full precision


def test_the_leanest_run_has_no_exact_change_left():
    lean = leanest(Run(**QLORA, packing="none", gradient_checkpointing=False))
    assert [change for change in EXACT if change.settings(lean) is not None] == []
    assert lean.rows_per_pass == lean.generated_at_once == 1


def test_a_card_without_room_for_the_weights_has_no_completion():
    nothing = longest(QWEN, Run(**QLORA), [2 * GIB])
    assert {one.tokens for one in nothing} == {(0,)}
    assert "load" in longest_table(nothing, [2 * GIB])


def test_the_table_has_a_column_for_each_card(found):
    lines = longest_table(found, CARDS).splitlines()
    assert lines[0].split()[-4:] == ["8", "GB", "24", "GB"]
    for line, one in zip(lines[1:], found, strict=False):
        assert line.startswith(one.name)
        assert line.split()[-2:] == [f"{tokens:,}" for tokens in one.tokens]


def test_the_committed_table_is_the_planners():
    committed = json.loads((benchmark.RESULTS / "longest.json").read_text())
    assert committed == json.loads(json.dumps(benchmark.table())), "run `python -m benchmarks.longest`"


def test_the_committed_picture_says_what_the_table_says():
    picture = (DOCS / "memory.svg").read_text(encoding="utf-8")
    drawn = json.loads((benchmark.RESULTS / "longest.json").read_text())["picture"]
    totals = [sum(parts.values()) for phases in drawn["gib"].values() for parts in phases.values()]
    assert [total for total in totals if f"{total:.1f}</text>" not in picture] == [], (
        "run `python -m benchmarks.longest`"
    )
    assert {LEANEST, TUNED} == set(drawn["gib"])
    for color in ("--ink", "--soft", "--line", *(f"--s{k}" for k in range(1, len(benchmark.PARTS) + 1))):
        assert picture.count(f"{color}:") == 2  # light and dark
