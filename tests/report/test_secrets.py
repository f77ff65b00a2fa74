import json

import pytest

from grpo_plus.report.secrets import MASK, is_secret_name, masked, masked_text, secrets_of

SECRET_NAMES = "token hub_token HF_TOKEN use_auth_token accessToken api_key apiKey OPENAI_API_KEY private-key key secret client_secret secrets password db.password passwd passphrase credentials Authorization"
PLAIN_NAMES = "pad_token eos_token bos_token max_token num_tokens tokens token_level max_completion_length tokenizer num_key_value_heads keys keyword keep sort_key prompt_key mask_token special_token image_token per_token monkey author"


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_a_name_that_holds_a_secret(name):
    assert is_secret_name(name)
    assert masked({name: "abc"}) == {name: MASK}


@pytest.mark.parametrize("name", PLAIN_NAMES.split())
def test_a_name_that_only_sounds_alike(name):
    assert masked({name: "abc"}) == {name: "abc"}


def test_secrets_are_found_at_any_depth_and_the_rest_stays():
    given = {"a": [{"token": "x1", "n": 3}, ("b", {"deep": {"api_key": ["k1", "k2"]}})], "password": {"user": "me"}}
    expected = {"a": [{"token": MASK, "n": 3}, ["b", {"deep": {"api_key": [MASK, MASK]}}]], "password": {"user": MASK}}
    assert masked(given) == expected
    assert given["a"][0]["token"] == "x1"
    assert masked(masked(given)) == expected


def test_whether_a_secret_was_given_is_none():
    assert masked({"token": None, "use_auth_token": True, "password": ""}) == {
        "token": None,
        "use_auth_token": True,
        "password": "",
    }
    assert masked({"password": 123456}) == {"password": MASK}


def test_a_table_as_json_is_masked_inside():
    assert json.loads(masked('{"token": "hidden", "trust": 1}')) == {"token": MASK, "trust": 1}
    assert masked("[1, 2") == "[1, 2"


# Made up, and cut in two so that no scanner takes them for real ones.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("read " + "hf" + "_abcdefghijklmnopqrstuvwx.", f"read {MASK}."),
        ("https://me:secret@host/x", f"https://{MASK}@host/x"),
        ("https://host/x?token=abc&n=1", f"https://host/x?token={MASK}&n=1"),
        ("Authorization: Bearer " + "abcdefgh12345", f"Authorization: Bearer {MASK}"),
        ("s" + "k-abcdefghijklmnopqrst", MASK),
        ("git@host:owner/name, hf_model, sk-learn", "git@host:owner/name, hf_model, sk-learn"),
    ],
)
def test_a_value_with_the_form_of_a_secret(text, expected):
    assert masked({"note": text}) == {"note": expected}


def test_a_known_secret_is_taken_out_of_a_text():
    secrets = secrets_of({"a": [{"token": "opensesame"}], "password": ["swordfish"], "pad_token": "<padding>"})
    assert secrets == {"opensesame", "swordfish"}
    assert masked_text("401 for opensesame and <padding>", secrets) == f"401 for {MASK} and <padding>"
