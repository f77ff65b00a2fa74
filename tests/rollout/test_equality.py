"""The grouped loop gives the tokens of transformers' own loop, and leaves the generator in the same state."""

import pytest

from grpo_plus.rollout import Rollouts
from tests.packing.models import CONFIGS, tiny
from tests.rollout.generating import GREEDY, GROUPS, ROWS, SAMPLED, assert_equal, batch, config, generated

# Why these generate by transformers' own loop.
REASONS = {"mpt": "use_cache=False", "phimoe": "PhimoeForCausalLM draws random numbers itself"}


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - REASONS))
def test_tokens_and_generator_state_are_those_of_transformers(name):
    model, rollouts = tiny(name), Rollouts(insists=True)
    for settings, padded in ((GREEDY, True), (SAMPLED, True), (SAMPLED, False)):
        inputs = batch(padded=padded)
        expected = generated(model, inputs, generation_config=config(**settings))
        found = generated(model, inputs, rollouts, generation_config=config(**settings))
        assert_equal(found, expected)
        [statistics] = found.statistics
        assert statistics.prompts == GROUPS
        # Greedy rows of one prompt end together.
        assert settings is GREEDY or statistics.row_steps < statistics.steps * GROUPS * ROWS


@pytest.mark.parametrize("name", sorted(REASONS))
def test_a_model_that_cannot_be_grouped_generates_by_transformers_own_loop(name):
    model, rollouts = tiny(name), Rollouts()
    inputs = batch(padded=True)
    expected = generated(model, inputs, generation_config=config(**SAMPLED))
    with pytest.warns(UserWarning, match=f"generation_loop: transformers' own loop. {REASONS[name]}"):
        found = generated(model, inputs, rollouts, generation_config=config(**SAMPLED))
    assert_equal(found, expected)
    assert not found.statistics
