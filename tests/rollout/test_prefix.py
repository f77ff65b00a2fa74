"""The cache with shared prompts: tokens and random state of transformers' own loop, and what the cache holds."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer

from grpo_plus.models.caches import CACHE
from grpo_plus.rollout.cache import BLOCK, Expanded
from grpo_plus.rollout.prefix import SharedPrompts
from grpo_plus.rollout.prompts import Prompts
from tests.packing.models import CONFIGS, HYBRIDS, OWN_ATTENTION, SHAPE, VOCABULARY, tiny
from tests.rollout.ending import ROW_PROMPTS, generated, kept_by

SUPPORTED = [name for name in CONFIGS if name not in (*HYBRIDS, *OWN_ATTENTION)]


def quiet(name, **changes):
    """A model that draws nothing by itself, as phimoe's router does in training."""
    return tiny(name, **changes).train(name != "phimoe")


@pytest.mark.parametrize(
    ("name", "padded"), [*((name, True) for name in SUPPORTED), ("qwen3", False), ("gemma3", False)]
)
def test_tokens_and_random_state_are_transformers(name, padded):
    model, keepers = quiet(name), []
    attention = model.config._attn_implementation
    found = generated(model, padded=padded, custom_generate=kept_by(SharedPrompts, keepers))
    assert model.config._attn_implementation == attention
    expected = generated(model, padded=padded)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert len(keepers[0].layers[0].keys) == 2  # a prompt was forgotten with its last row


def test_in_half_precision_logits_are_those_of_the_expanded_cache():
    model, seen = quiet("qwen3").to(torch.bfloat16), []

    class Seen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen[-1].append(scores)
            return scores

    for keeper in (Expanded, SharedPrompts):
        seen.append([])
        with torch.autocast("cpu", torch.bfloat16):
            generated(model, padded=True, custom_generate=kept_by(keeper, []), logits_processor=[Seen()])
    (_, expanded, *_), (_, shared, *_) = seen  # after the first token, the same in both
    assert 0 < (shared - expanded).norm() / expanded.norm() < 0.01


def test_a_prompt_is_kept_once():
    model, length = quiet("qwen3"), 200
    ids = torch.randint(5, VOCABULARY, (2, length))
    token = 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4
    held = {}
    for kind in (SharedPrompts, Expanded):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache}, use_cache=True)
        keeper = kind(model, cache)
        keeper.expand(torch.arange(2).repeat_interleave(8), None)
        layers = [*cache.layers, *getattr(keeper, "layers", {}).values()]
        storages = {s.untyped_storage() for layer in layers for s in (layer.keys, layer.values)}
        held[kind] = sum(storage.nbytes() for storage in {s.data_ptr(): s for s in storages}.values()) // token
    assert held == {SharedPrompts: 2 * length + 16 * BLOCK, Expanded: 16 * (length + BLOCK)}


def test_a_call_of_the_model_in_the_middle_of_a_rollout_is_an_error_and_the_attention_comes_back():
    model = quiet("qwen3")

    class Meddles(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 25:
                model(input_ids=input_ids)
            return scores

    attention = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="in the middle of a rollout"):
        generated(model, padded=False, custom_generate=kept_by(SharedPrompts, []), logits_processor=[Meddles()])
    assert model.config._attn_implementation == attention
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_a_cache_without_the_models_windows_is_an_error():
    model = quiet("mistral")

    def full(model, cache):
        cache.layers = [DynamicLayer() for _ in cache.layers]
        return SharedPrompts(model, cache)

    with pytest.raises(RuntimeError, match="has a window of 9, its cache of None"):
        generated(model, padded=False, custom_generate=kept_by(full, []))


@pytest.mark.parametrize(("name", "reason"), [("bloom", "attention interface"), ("qwen3_5", "LinearAttentionLayer")])
def test_models_that_cannot_share_prompts_are_named(name, reason):
    model = tiny(name)
    assert reason in SharedPrompts.why_not(model, DynamicCache(config=model.config))


def test_prompts_are_shared_where_a_step_reads_less_by_it():
    model = quiet("qwen3")  # 128 bytes of keys and values of a token in a layer
    prompts = Prompts(torch.arange(3), torch.tensor(ROW_PROMPTS))  # 5 rows more than prompts
    least = -(-4 * 2**20 // (5 * 128))
    assert SharedPrompts.pays(model, prompts, least)
    assert not SharedPrompts.pays(model, prompts, least - 1)
    assert not SharedPrompts.pays(model, Prompts(torch.arange(3), torch.arange(3)), 10**9)
