"""Rollouts of image prompts: tokens and generator are those of TRL's loop, and each group's pictures are read once."""

import logging

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.rollout import Rollouts, passes, prefix, steps
from grpo_plus.trainer.rollouts import shown
from grpo_plus.trainer.rollouts.shown import tiles_by_row
from tests.close import differing
from tests.rollout.test_in_the_trainer import without_sampler
from tests.training import logs_of, weights_of
from tests.vision import FAMILIES, make_vision_trainer, pictured, pictures

ROWS = 3
# The first two prompts differ in nothing but the pixels.
SHOWN = [pictures((24, 16)), pictures((24, 16), seed=1), pictures((16, 40), (32, 32), seed=2)]
TEXTS = ["How many?", "How many?", "Is it?"]
ENDS = {"eos_token_id": [*range(2, 40)]}


def asked(text, images=()):
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


SEEING = [asked(text, images) for text, images in zip(TEXTS, SHOWN, strict=True) for _ in range(ROWS)]
READING = [asked(text) for text in ("How many?", "Is it?") for _ in range(ROWS)]


def trainer(folder, name, loop="grouped", **config):
    settings = {"max_completion_length": 6, "generation_kwargs": ENDS, "generation_loop": loop, "max_steps": 1}
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    return make_vision_trainer(folder, name, **classes, **(settings | config))


def generated(made, prompts, generate=None):
    """Completions, and the state in which the generator is left. By TRL's own method, or by that of the trainer."""
    tokenized = made._tokenize_prompts(prompts)
    torch.manual_seed(1)
    completions, _ = (generate or type(made)._generate_single_turn)(made, *tokenized, ROWS)
    return completions, torch.get_rng_state().tolist()


def by_trl(made, prompts):
    return generated(made, prompts, GRPOTrainer._generate_single_turn)


class Reads:
    """Counts the pictures, tiles or patches that a model's tower reads."""

    def __init__(self, model):
        self.count = 0
        model.get_encoder(modality="image").register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, tower, args, kwargs):
        self.count += len(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)))

    def of(self, call):
        before = self.count
        result = call()
        return result, self.count - before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_generates_what_transformers_generates(tmp_path, name):
    made = trainer(tmp_path, name)
    reads = Reads(made.model)
    expected, read_by_trl = reads.of(lambda: by_trl(made, SEEING))
    assert generated(made, SEEING) == expected
    assert made.speed.rollouts.statistics[0].prompts == len(SHOWN)
    again, read = reads.of(lambda: generated(made, SEEING))  # without the self-check
    assert again == expected
    assert read * ROWS == read_by_trl
    statistics = made.speed.rollouts.statistics[0]
    assert statistics.row_steps < statistics.steps * len(SEEING)  # rows have left
    assert generated(made, READING) == by_trl(made, READING)
    assert made.speed.rollouts.statistics[0].prompts == 2


def test_the_offsets_of_the_rows_are_left_as_transformers_leaves_them(tmp_path):
    made = trainer(tmp_path, "qwen2_5_vl")
    by_trl(made, SEEING)
    expected = made.model.model.rope_deltas
    generated(made, SEEING)
    assert made.model.model.rope_deltas.tolist() == expected.tolist()
    assert len(expected) == len(SEEING)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_parts_of_a_generation_take_their_own_pictures_along(tmp_path, name):
    made = trainer(tmp_path, name, generation_chunk_size=5, generation_kwargs=ENDS | {"do_sample": False})
    assert generated(made, SEEING)[0] == by_trl(made, SEEING)[0]
    assert [part.rows for part in made.speed.rollouts.statistics] == [5, 4]


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
TRAININGS = {
    "qwen2_5_vl": {"trainer_arguments": {"peft_config": LORA}, "bf16": True},
    "gemma3": {"train_dataset": pictured((2, 2, 2, 2))},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_on_pictures_is_the_same_to_the_last_bit(tmp_path, name):
    theirs = trainer(tmp_path / "trl", name, "trl", **TRAININGS[name])
    theirs.train()
    ours = trainer(tmp_path / "ours", name, **TRAININGS[name])
    start = weights_of(ours)
    ours.train()
    assert ours.speed.rollouts.statistics[0].rows == 8
    assert without_sampler(logs_of(ours)) == logs_of(theirs)
    assert differing(weights_of(ours), start)
    assert differing(weights_of(ours), weights_of(theirs)) == []


def test_pictures_that_do_not_reach_their_prompts_are_found_before_the_first_use(tmp_path, monkeypatch):
    made = trainer(tmp_path, "llava", "auto")
    expected = by_trl(made, SEEING)
    encoded = steps.encoded

    def mixed_up(model, ids, arguments, images):
        return encoded(model, ids, arguments, {name: value.flip(0) for name, value in images.items()})

    monkeypatch.setattr(steps, "encoded", mixed_up)
    with pytest.warns(UserWarning, match="cache in place is not exact on LlavaForConditionalGeneration"):
        assert generated(made, SEEING) == expected
    assert not made.speed.rollouts.statistics
    assert generated(made, READING) == by_trl(made, READING)  # rows of text have a verdict of their own
    assert made.speed.rollouts.statistics


def test_pictures_that_nobody_sorts_by_row_are_left_to_transformers(tmp_path):
    made = trainer(tmp_path, "llava", "auto")
    expected = by_trl(made, SEEING)
    rollouts = Rollouts()
    with pytest.warns(UserWarning, match="nothing tells which row an image belongs to"), rollouts.decoding(made.model):
        assert by_trl(made, SEEING) == expected
    assert not rollouts.statistics


def test_tiles_that_tokens_do_not_explain_are_left_to_transformers(tmp_path, monkeypatch):
    made = trainer(tmp_path, "internvl", "auto", generation_chunk_size=5)
    expected = by_trl(made, SEEING)
    monkeypatch.setattr(shown, "tiles_by_row", lambda sizes, tokens: None)
    with (
        pytest.warns(UserWarning, match="generation_chunk_size: all rows at once. nothing tells which tiles"),
        pytest.warns(UserWarning, match="generation_loop: transformers' own loop. nothing tells which tiles"),
    ):
        assert generated(made, SEEING) == expected
    assert not made.speed.rollouts.statistics


def test_prompts_of_text_that_begin_alike_take_one_pass_on_a_model_that_sees(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="grpo_plus")
    monkeypatch.setitem(passes.LEAST_SAVED, "cpu", 1)
    made = trainer(tmp_path, "qwen2_5_vl")
    assert generated(made, READING) == by_trl(made, READING)
    assert "generation: each prompt in one pass. the model reads more than text." in caplog.text


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_prompts_with_pictures_may_be_kept_once(tmp_path, monkeypatch, caplog, name):
    caplog.set_level(logging.INFO, logger="grpo_plus")
    monkeypatch.setattr(prefix, "LEAST_SAVED", {"cpu": 0})
    made = trainer(tmp_path, name)
    assert generated(made, SEEING) == by_trl(made, SEEING)
    assert "generation: each prompt once (3x fewer), finished rows leave, images once, one cache of each" in caplog.text


def test_tiles_follow_from_tokens():
    # Tiles of 2, 1 and 3 units, 4 tokens a unit: 12 tokens for the first two, none for a row of text, 12 for the last.
    assert tiles_by_row([2, 1, 3], [12, 0, 12]) == [2, 0, 1]
    assert tiles_by_row([1, 1], [0, 8]) == [0, 2]
    assert tiles_by_row([2, 1, 3], [4, 20]) is None
    assert tiles_by_row([1, 1], [0, 0]) is None
