"""Generation's bytes: counted on real rollouts, and asked the other way round."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from grpo_plus.planner import Constants, Run, generation, shape_of
from grpo_plus.planner.generation import generation_bytes, keeps_prompts_once, rows_in
from grpo_plus.rollout import Rollouts, cache, prefix
from tests.planner.configs import QWEN3_4B
from tests.planner.tracking import Allocations

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
EXACT = Constants(fragmentation=1)
TUNED: dict[str, Any] = {"dtype": "bfloat16", "lora_r": 16, "per_device_train_batch_size": 64}


@pytest.mark.parametrize(
    ("loop", "once", "prompt", "completion"),
    [("trl", False, 64, 120), ("grouped", False, 64, 120), ("grouped", False, 300, 20), ("grouped", True, 200, 80)],
    ids=["transformers' own", "grouped", "long prompts, copied", "prompts once"],
)
def test_a_rollout_allocates_what_is_planned(monkeypatch, loop, once, prompt, completion):
    least = 0 if once else 2**40
    monkeypatch.setitem(prefix.LEAST_SAVED, "cpu", least)
    monkeypatch.setattr(generation, "LEAST_SAVED", least)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).eval()
    ids = torch.randint(5, 60, (2, prompt)).repeat_interleave(4, 0)
    settings = GenerationConfig(min_new_tokens=completion, max_new_tokens=completion, pad_token_id=0, eos_token_id=2)
    rollouts = Rollouts(insists=True)

    def generate(settings: GenerationConfig) -> None:
        if loop == "trl":
            model.generate(input_ids=ids, generation_config=settings)
            return
        with rollouts.decoding(model):
            model.generate(input_ids=ids, generation_config=settings)

    if loop == "grouped":  # the self-check comes before
        generate(GenerationConfig(max_new_tokens=2, pad_token_id=0, eos_token_id=2))
    with torch.no_grad(), Allocations([*model.parameters(), *model.buffers()]) as counted:
        generate(settings)
    run = Run(
        prompt_length=prompt, max_completion_length=completion, num_generations=4, generation_loop=loop, bf16=False
    )
    planned = generation_bytes(shape_of({"model_type": "qwen3"} | CONFIG), run, EXACT)
    assert sum(planned.values()) == pytest.approx(counted.peak, rel=0.1)


def test_the_planner_knows_the_loops_constants():
    assert cache.BLOCK == generation.BLOCK
    assert prefix.LEAST_SAVED_ELSEWHERE == generation.LEAST_SAVED


def test_prompts_kept_once_leave_room_for_more_rows():
    shape = shape_of(QWEN3_4B)
    run = Run(**TUNED, prompt_length=2048, max_completion_length=512)
    free = 4 * 2**30
    rows = {
        name: rows_in(free, shape, changed)
        for name, changed in {
            "once": run,
            "copied": replace(run, num_generations=1),
            "8 bits": replace(run, cache_bits=8, prompt_length=64, max_completion_length=2496),
            "16 bits": replace(run, generation_loop="trl", prompt_length=64, max_completion_length=2496),
        }.items()
    }
    assert keeps_prompts_once(shape, run)
    # Eight rows hold one prompt of 2048 tokens and 8 x 512 of their own, in place of 8 x 2560.
    assert rows["once"] > 2 * rows["copied"]
    assert 1.3 * rows["16 bits"] < rows["8 bits"] < 2 * rows["16 bits"]
    fits = [
        sum(generation_bytes(shape, replace(run, generation_chunk_size=n), Constants()).values()) * 1.08 <= free
        for n in (rows["once"], rows["once"] + 1)
    ]
    assert fits == [True, False]
    assert rows_in(0, shape, run) == 1


def test_rows_that_do_not_fill_whole_groups_may_cut_two_prompts():
    run = Run(**TUNED)
    assert [replace(run, generation_chunk_size=rows).prompts_at_once for rows in (1, 3, 8, 9, 10, 16)] == [
        1,
        2,
        1,
        2,
        3,
        2,
    ]
