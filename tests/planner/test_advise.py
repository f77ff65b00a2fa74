import random
from dataclasses import replace
from typing import Any

import pytest

from grpo_plus.planner import QLORA, Constants, Run, advise, largest, plan, resized, shape_of
from grpo_plus.planner.constants import GIB
from tests.planner.configs import LLAMA_3_1_8B, QWEN3_1_7B, QWEN3_4B

QWEN = shape_of(QWEN3_4B)
WHOLE = QLORA | {"max_tokens_per_pass": None, "mlp_tile_tokens": None}
SIZES = ("max_completion_length", "num_generations", "per_device_train_batch_size")


def settings_of(advice) -> list[tuple[str, ...]]:
    return [tuple(made.settings) for made in advice.suggestions]


def test_a_run_that_fits_needs_no_advice():
    advice = advise(QWEN, 24 * GIB, Run(**QLORA))
    assert (advice.suggestions, advice.fits) == ((), True)
    assert "fits as it is" in advice.text()


@pytest.mark.parametrize("config", [QWEN3_1_7B, QWEN3_4B, LLAMA_3_1_8B], ids=["1.7B", "4B", "8B"])
@pytest.mark.parametrize("gpu", [6, 8, 12, 16, 24, 80])
def test_the_advice_fits_and_its_savings_add_up(config, gpu):
    shape, run = shape_of(config), Run(max_completion_length=2048, beta=0.04, packing="none")
    advice = advise(shape, gpu * GIB, run)
    changed = run
    for made in advice.suggestions:
        assert made.saves > -WORTHLESS
        changed = replace(changed, **made.settings)
    assert advice.plan.run == changed
    before, after = plan(shape, run).peak, plan(shape, changed).peak
    assert sum(made.saves for made in advice.suggestions) == pytest.approx(before - after)
    assert advice.fits == plan(shape, changed).fits(gpu * GIB)
    # 4-bit weights of 8 B parameters and their embeddings leave nothing of 6 GiB to train with.
    assert advice.fits or (config is LLAMA_3_1_8B and gpu == 6)


WORTHLESS = 1.0  # byte


def test_each_suggestion_saves_something_where_it_stands():
    # Generation binds first, and the micro-batch, which is cheaper to change, only then.
    run = Run(**QLORA, max_completion_length=2048, gradient_accumulation_steps=4)
    advice = advise(QWEN, 8 * GIB, run)
    assert settings_of(advice)[0] == ("generation_chunk_size",)
    assert advice.fits
    assert [made for made in advice.suggestions if made.saves <= 0.1 * GIB] == []


def test_no_suggestion_is_superfluous():
    rng = random.Random(0)
    for _ in range(40):
        run = Run(
            max_completion_length=rng.choice([256, 1024, 4096]),
            per_device_train_batch_size=rng.choice([4, 8]),
            gradient_accumulation_steps=rng.choice([2, 4]),
            gradient_checkpointing=rng.random() < 0.5,
            packing=rng.choice(["auto", "none"]),
            beta=rng.choice([0.0, 0.04]),
            **rng.choice([{}, {"lora_r": 16}, QLORA]),
        )
        gpu_bytes = rng.choice([8, 12, 16, 24, 48]) * GIB
        advice = advise(QWEN, gpu_bytes, run)
        steps = [made.settings for made in advice.suggestions]
        for left_out in steps[-1:]:
            changed = run
            for settings in steps:
                changed = replace(changed, **settings) if settings is not left_out else changed
            assert not plan(QWEN, changed).fits(gpu_bytes)


@pytest.mark.parametrize(
    ("settings", "gpu", "first"),
    [
        # What costs least comes first: each run is too large in one respect.
        ({**WHOLE, "packing": "none", "prompt_length": 2048, "max_completion_length": 256}, 9, ("packing",)),
        ({**WHOLE, "dtype": "float32", "max_completion_length": 512}, 8, ("dtype",)),
        ({**WHOLE, "lora_dropout": 0.05, "max_completion_length": 1200}, 10, ("lora_dropout",)),
        ({**WHOLE, "gradient_accumulation_steps": 16, "max_completion_length": 512}, 12, ("generation_chunk_size",)),
        ({**WHOLE, "gradient_checkpointing": False}, 12, ("gradient_checkpointing",)),
        ({**WHOLE, "max_completion_length": 2048}, 9, ("per_device_train_batch_size", "gradient_accumulation_steps")),
        (
            {**QLORA, "mlp_tile_tokens": None, "max_completion_length": 11_000, "generation_chunk_size": 1},
            8,
            ("mlp_tile_tokens",),
        ),
        (
            {**WHOLE, "mlp_tile_tokens": "auto", "max_completion_length": 4096, "generation_chunk_size": 1},
            9,
            ("per_device_train_batch_size", "gradient_accumulation_steps"),
        ),
        ({**QLORA, "max_completion_length": 20_000, "generation_chunk_size": 1}, 9, ("offload_activations",)),
        (
            {"dtype": "bfloat16", "beta": 0.04, "optim": "sgd", "per_device_train_batch_size": 1, "num_generations": 1},
            24,
            ("beta",),
        ),
        ({"lora_r": 16, "dtype": "bfloat16", "per_device_train_batch_size": 8}, 8, ("load_in_4bit",)),
    ],
)
def test_the_cheapest_remedy(settings: dict[str, Any], gpu, first):
    advice = advise(QWEN, gpu * GIB, Run(**settings))
    assert advice.fits
    assert settings_of(advice)[0][: len(first)] == first


def test_trained_weights_are_not_put_into_half_precision():
    # Updates at a learning rate of 1e-6 would round away.
    for gpu in (40, 60, 70):
        for made in advise(QWEN, gpu * GIB, Run()).suggestions:
            assert (
                "dtype" not in made.settings
                or "lora_r" in made.settings
                or advise(QWEN, gpu * GIB, Run()).plan.run.lora_r
            )


def test_completions_are_cut_only_when_nothing_else_helps():
    advice = advise(QWEN, 5 * GIB, Run(max_completion_length=16384))
    assert advice.fits
    assert settings_of(advice)[-1] == ("max_completion_length",)
    longer = replace(advice.plan.run, max_completion_length=advice.plan.run.max_completion_length + 1)
    assert not plan(QWEN, longer).fits(5 * GIB)


def test_what_cannot_fit_is_said_not_to():
    advice = advise(QWEN, 2 * GIB, Run())
    assert not advice.fits
    assert "still does not fit" in advice.text()


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("gpu", [10, 12, 16])
def test_the_largest_fits_and_the_next_does_not(field, gpu):
    run = Run(**QLORA, max_completion_length=600, gradient_accumulation_steps=4)
    size = largest(QWEN, run, gpu * GIB, field)
    if field == "max_completion_length":
        assert plan(QWEN, replace(run, max_completion_length=size)).fits(gpu * GIB)
        assert not plan(QWEN, replace(run, max_completion_length=size + 1)).fits(gpu * GIB)
    if field == "num_generations":
        # Four prompts per generation batch, as the run has: the cache of four groups bounds them.
        def cached(group: int) -> bool:
            rows = replace(run, num_generations=group, per_device_train_batch_size=4, gradient_accumulation_steps=group)
            return plan(QWEN, rows).phase("generate") <= gpu * GIB - Constants().unusable_bytes

        assert cached(size)
        assert not cached(size + 1)
    if field == "per_device_train_batch_size":
        assert 0 < size <= 32
    assert largest(QWEN, run, (gpu + 2) * GIB, field) >= size


def test_a_micro_batch_is_at_most_the_generation_batch():
    assert largest(QWEN, Run(**QLORA, gradient_accumulation_steps=2), 500 * GIB, "per_device_train_batch_size") == 16


def test_nothing_fits_on_a_card_without_room_for_the_weights():
    assert [largest(QWEN, Run(), 2 * GIB, field) for field in SIZES] == [0, 0, 0]


def test_the_largest_group_may_lie_behind_a_group_that_does_not_fit():
    """From five completions on, the prompts of this run are kept once and not copied."""
    run = Run(**QLORA | {"max_completion_length": 1024, "gradient_accumulation_steps": 8})
    sizes = [plan(QWEN, resized(run, "num_generations", size)).fits(12 * GIB) for size in range(3, 8)]
    assert sizes == [True, False, True, False, False]
    assert largest(QWEN, run, 12 * GIB, "num_generations") == 5


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="field='beta' has no largest value"):
        largest(QWEN, Run(), GIB, "beta")


def test_constants_reach_the_advice():
    run, wide = Run(**WHOLE, max_completion_length=800), Constants(fragmentation=2)
    assert advise(QWEN, 8 * GIB, run).fits
    assert len(advise(QWEN, 8 * GIB, run, constants=wide).suggestions) > len(advise(QWEN, 8 * GIB, run).suggestions)


def test_what_has_to_follow_a_size_follows():
    # 4 prompts of 8: with 34 completions each 136 rows, of which TRL can take 8 at a time in 17 passes.
    found = resized(
        Run(num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=4), "num_generations", 34
    )
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (8, 17)
    # Two generation batches per optimizer step stay two, whatever a pass takes.
    twice = Run(per_device_train_batch_size=8, gradient_accumulation_steps=8, steps_per_generation=4)
    found = resized(twice, "per_device_train_batch_size", 2)
    assert (found.gradient_accumulation_steps, found.steps_per_generation) == (32, 16)
