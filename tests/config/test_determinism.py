"""A deterministic run refuses, by field, what the clock or the free memory decides."""

import pytest

from grpo_plus.config.determinism import fixes_choices, why_not_repeatable
from tests.config.test_fields import config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deterministic": "yes"}, "deterministic='yes' must be True or False"),
        (
            {"deterministic": True, "generation_chunk_size": "auto"},
            r"^deterministic=True with generation_chunk_size='auto': the free memory .*Set generation_chunk_size to a n",
        ),
        (
            {"full_determinism": True, "generation_chunk_size": "auto"},
            "^full_determinism=True with generation_chunk_size='auto'",
        ),
        ({"deterministic": True, "use_vllm": True}, "with use_vllm=True: vLLM's scheduler .*Set use_vllm=False, or l"),
        (
            {"deterministic": True, "use_transformers_continuous_batching": True},
            "with use_transformers_continuous_batching=True: the free memory",
        ),
    ],
)
def test_what_cannot_be_repeated_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_top_p_is_refused_on_a_gpu_alone():
    made = config(deterministic=True, top_p=0.9)
    assert why_not_repeatable(made, "cpu") is None
    assert "top_p=0.9: torch has no deterministic sum" in why_not_repeatable(made, "cuda")
    assert why_not_repeatable(config(deterministic=True), "cuda") is None


@pytest.mark.parametrize("mode", ["deterministic", "full_determinism"])
def test_both_modes_fix_our_choices_and_leave_numbers_alone(mode):
    made = config(**{mode: True})
    assert fixes_choices(made)
    assert made.max_tokens_per_pass is None
    assert config(**{mode: True}, max_tokens_per_pass=64).max_tokens_per_pass == 64
    assert not fixes_choices(config())
    assert config().max_tokens_per_pass == "auto"
