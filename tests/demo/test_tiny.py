import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_plus.demo.tiny import CHARACTERS, SPECIAL_TOKENS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def without_special_tokens(text):
    return not any(token in text for token in SPECIAL_TOKENS)


@given(st.text(alphabet=CHARACTERS).filter(without_special_tokens))
def test_text_survives_a_round_trip_one_token_per_character(text):
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_are_single_tokens_and_decoding_can_skip_them():
    ids = TOKENIZER("<bos> a<eos><pad>")["input_ids"]
    assert ids == [1, TOKENIZER.convert_tokens_to_ids(" "), TOKENIZER.convert_tokens_to_ids("a"), 2, 0]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == " a"


def test_an_unknown_character_becomes_unk():
    assert TOKENIZER("é")["input_ids"] == [TOKENIZER.unk_token_id]


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["abc", "c"], padding=True)
    assert batch["input_ids"][1] == [TOKENIZER.pad_token_id] * 2 + TOKENIZER("c")["input_ids"]
    assert batch["attention_mask"][1] == [0, 0, 1]


def test_chat_template_names_the_roles_and_ends_the_answer():
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "user: 2+2?\nassistant: 4<eos>"
    prompt = TOKENIZER.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "user: 2+2?\nassistant: "


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text"])
def test_a_saved_model_and_tokenizer_come_back_the_same(architecture, tmp_path):
    model = tiny_model(TOKENIZER, architecture=architecture, hidden_size=32, num_heads=4, num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(CHARACTERS)
    inputs = tokenizer([text, "b"], return_tensors="pt", padding=True)
    assert torch.equal(inputs["input_ids"], TOKENIZER([text, "b"], return_tensors="pt", padding=True)["input_ids"])
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**inputs).logits, model.eval()(**inputs).logits)


def test_the_seed_alone_decides_the_weights_and_the_caller_keeps_their_random_state():
    torch.manual_seed(5)
    first = tiny_model(TOKENIZER, hidden_size=32, seed=1)
    after_model = torch.rand(3)
    again, other = tiny_model(TOKENIZER, hidden_size=32, seed=1), tiny_model(TOKENIZER, hidden_size=32, seed=2)
    torch.manual_seed(5)
    assert torch.equal(after_model, torch.rand(3))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_model_knows_the_special_tokens_of_the_tokenizer():
    config = tiny_model(TOKENIZER, hidden_size=32).generation_config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
