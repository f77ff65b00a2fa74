"""Rows with images through the cached form: each prompt's images go through the model once, and nothing else changes."""

import logging
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_plus.models.pictures import Pictures
from grpo_plus.packing import Packer, PaddedRows, forward_live, passes, seen
from grpo_plus.packing.choice import Choice
from grpo_plus.packing.measure import Measure
from grpo_plus.packing.padded import Layout
from grpo_plus.packing.passes import CACHED
from tests.close import assert_close
from tests.packing.pictured import PROMPTS, padded, pictured_alone, pictured_batch, pictured_model
from tests.packing.rows import COMPLETION, gradients

FIVE = ("qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "llava_next")
CPU = torch.device("cpu")


def packed(model, base, rows, bound=None):
    layout = Layout.of(rows)
    layout.locate(base)
    parts = layout.ready(CACHED, CPU, None, bound)
    logps, _ = Choice(CACHED, None).run(model, parts)
    places = torch.cat([part.rows for part in parts]), torch.cat([part.columns for part in parts])
    return torch.zeros(len(rows.input_ids), COMPLETION).index_put(places, logps)


def logps_of(model, rows, packing="auto"):
    chosen = Packer(packing)
    result = chosen.logps(model, model, rows, padded(model))
    return chosen, result


def assert_exact(model, base, batch, bound=None):
    values, expected = gradients(model, lambda: pictured_alone(model, batch))
    logps, actual = gradients(model, lambda: packed(model, base, batch.rows, bound))
    assert_close("log-probs", logps, values, rtol=2e-6)
    assert (actual - expected).norm() <= 2e-6 * expected.norm()


@pytest.fixture(scope="module")
def qwen():
    return pictured_model("qwen2_5_vl")


@pytest.mark.parametrize("name", FIVE)
def test_pictures_of_unequal_sizes_beside_text_give_what_each_row_gives_alone(name):
    model, processor = pictured_model(name)
    batch = pictured_batch(model, processor)
    assert [group.rows for group in Layout.of(batch.rows).groups] == [(0, 5), (1, 4, 7), (2,), (3, 6)]
    assert_exact(model, model, batch)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_checkpointed_layers_and_bounded_passes_give_the_same(name):
    model, processor = pictured_model(name, checkpointing=True)
    # So short that the prompt of text goes through in parts.
    assert_exact(model, model, pictured_batch(model, processor), bound=20)


def test_lora_on_the_language_model_above_a_frozen_tower_gives_the_same():
    base, processor = pictured_model("qwen2_5_vl")
    model = get_peft_model(base, LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj", init_lora_weights=False))
    assert_exact(model, base, pictured_batch(base, processor))


def test_each_picture_goes_through_the_tower_once(qwen, monkeypatch):
    model, processor = qwen
    seen_patches = []
    hook = model.model.visual.register_forward_pre_hook(lambda _, inputs: seen_patches.append(len(inputs[0])))
    packed(model, model, pictured_batch(model, processor).rows)
    hook.remove()
    rows = pictured_batch(model, processor).rows
    distinct = [len(rows.pictures.images["pixel_values"][row]) for row in (1, 2, 3)]
    assert sum(seen_patches) == sum(distinct)


def test_the_model_remembers_no_positions_of_ours(qwen):
    model, processor = qwen
    model.model.rope_deltas = marked = torch.tensor([[-7]])
    packed(model, model, pictured_batch(model, processor).rows).sum().backward()
    assert model.model.rope_deltas is marked


def test_rows_with_images_and_rows_of_text_have_forms_of_their_own(qwen, caplog):
    model, processor = qwen
    rows = pictured_batch(model, processor).rows
    chosen = Packer("auto")
    text = [row for row, group in enumerate(rows.pictures.counts["num_images"]) if group == 0]
    with caplog.at_level(logging.INFO, "grpo_plus"), torch.no_grad():
        words = PaddedRows(rows.input_ids[text], rows.attention_mask[text], COMPLETION)
        first = chosen.logps(model, model, words, padded(model))
        result = chosen.logps(model, model, rows, padded(model))
        again = chosen.logps(model, model, words, padded(model))
    assert "segment attention" in caplog.text
    assert "two passes through the model's cache" in caplog.text
    assert_close("words", result.logps[text], first.logps, rtol=1e-5)
    assert torch.equal(first.logps, again.logps)


def _positions_by_count(model, groups):
    return list(groups)


def _another_order(images):
    return joined(images[::-1])


def _no_types(groups, length):
    return replace(prompts(groups, length), types=())


joined, prompts = seen.joined_images, passes._prompts


@pytest.mark.parametrize(
    ("name", "module", "function", "wrong"),
    [
        ("qwen2_5_vl", "padded", "located", _positions_by_count),
        ("qwen2_5_vl", "passes", "joined_images", _another_order),
        ("gemma3", "passes", "_prompts", _no_types),
    ],
)
def test_the_self_check_finds_wrong_positions_wrong_images_and_missing_types(
    name, module, function, wrong, monkeypatch
):
    model, processor = pictured_model(name)
    batch = pictured_batch(model, processor)
    monkeypatch.setattr(f"grpo_plus.packing.{module}.{function}", wrong)
    with pytest.warns(UserWarning, match="rows with images stay padded.*two passes"):
        chosen, result = logps_of(model, batch.rows)
    assert result is None
    assert chosen.describe() == "none"
    with pytest.raises(ValueError, match="packing='shared_prompt' cannot be exact here"):
        logps_of(model, batch.rows, "shared_prompt")


def test_a_batch_of_one_prompt_is_checked_behind_padding_too(qwen, monkeypatch):
    model, processor = qwen
    batch = pictured_batch(model, processor, PROMPTS[:1], range(3))
    monkeypatch.setattr(passes, "_prompts", lambda groups, length: replace(prompts(groups, length), mask=None))
    with pytest.warns(UserWarning, match="rows with images stay padded.*two passes"):
        assert logps_of(model, batch.rows)[1] is None


def test_a_tower_whose_gradient_is_lost_on_the_way_is_found(qwen, monkeypatch):
    model, processor = qwen
    batch = pictured_batch(model, processor)
    monkeypatch.setattr(passes, "joined_images", lambda images: {k: v.detach() for k, v in joined(images).items()})
    with pytest.warns(UserWarning, match=r"gradients by 1\.0e\+00"):
        assert logps_of(model, batch.rows)[1] is None


def test_padding_free_leaves_rows_with_images_padded(qwen):
    model, processor = qwen
    with pytest.warns(UserWarning, match="rows with images stay padded. packing='padding_free' shares no prompt"):
        assert logps_of(model, pictured_batch(model, processor).rows, "padding_free")[1] is None


def test_images_in_a_completion_or_at_the_end_of_a_prompt_leave_the_rows_padded(qwen):
    model, processor = qwen
    rows = pictured_batch(model, processor).rows
    types = {name: value.clone() for name, value in rows.pictures.types.items()}
    types["mm_token_type_ids"][0, -COMPLETION] = 1
    answered = replace(rows, pictures=Pictures(rows.pictures.images, types, rows.pictures.counts))
    with pytest.warns(UserWarning, match="stay padded where a completion has images, such as a tool's"):
        assert logps_of(model, answered)[1] is None
    ids = rows.input_ids.clone()
    ids[1, -COMPLETION - 1] = model.config.image_token_id
    with pytest.warns(UserWarning, match="stay padded where a prompt ends within an image"):
        assert logps_of(model, replace(rows, input_ids=ids))[1] is None


def test_an_image_in_a_completion_is_told_from_a_token_of_images_that_the_policy_writes():
    model, processor = pictured_model("llava_next")
    rows = pictured_batch(model, processor).rows
    assert not rows.pictures.types
    ids = rows.input_ids.clone()
    ids[4, -COMPLETION] = model.config.image_token_id
    written = replace(rows, input_ids=ids)
    with torch.no_grad():
        assert logps_of(model, written)[1] is not None
        one_more = [count + (row in (1, 4, 7)) for row, count in enumerate(rows.pictures.counts["num_images"])]
        answered = replace(written, pictures=replace(rows.pictures, counts={"num_images": one_more}))
        with pytest.warns(UserWarning, match="stay padded where a completion has images, such as a tool's"):
            assert logps_of(model, answered)[1] is None


class Clock:
    """Seconds by what ran since the last look: a padded forward takes longer."""

    def __init__(self, forwards):
        self.forwards, self.seconds = forwards, 0.0

    def __call__(self):
        self.seconds += 1.0 + len(self.forwards)
        self.forwards.clear()
        return self.seconds


def test_rows_with_images_are_measured_beside_trls_own_way(qwen, caplog):
    model, processor = qwen
    rows, forwards = pictured_batch(model, processor).rows, []

    def forward(*inputs, **shown):
        forwards.append(shown["pixel_values"])
        return padded(model)(*inputs, **shown)

    chosen = Packer("auto", measure=Measure(clock_of=lambda _: Clock(forwards)))
    with caplog.at_level(logging.INFO, "grpo_plus"):
        assert chosen.logps(model, model, rows, forward, policy=True) is not None
    assert "measured shared_prompt (two passes through the model's cache) 2.0x; TRL 1.0x" in caplog.text


def test_a_skipped_row_takes_its_picture_along(qwen):
    model, processor = qwen
    whole = pictured_batch(model, processor).rows
    rows = replace(whole, live=(6, 1, 0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = logps_of(model, whole)[1].logps
        result = logps_of(model, rows)[1].logps
        apart = forward_live(rows, lambda *args, **shown: (padded(model)(*args, COMPLETION, **shown),) * 2).logps
    live = torch.tensor(rows.live)
    inside = rows.completion_mask[live].bool()
    for logps in (result, apart):
        assert_close("live rows", logps[live][inside], expected[live][inside], rtol=1e-5)
    assert result[[2, 3, 4, 5, 7]].eq(0).all()
