import re
from dataclasses import fields

import pytest
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, cli
from grpo_plus.cli.flags_help import OURS


@pytest.fixture(scope="module")
def text():
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    return out.getvalue()


def test_our_flags_come_first_and_trls_follow_in_groups(text):
    titles = re.findall(r"^(\S.*):$", text, flags=re.MULTILINE)
    assert titles == [
        *(f"grpo_plus: {title}" for title in OURS),
        "model, data and rewards",
        "GRPO (TRL)",
        "training (transformers)",
    ]
    flags = [
        "--advantage_estimator",
        "--eval_pass_at_k",
        "--qlora",
        "--packing",
        "--model_name_or_path",
        "--num_generations",
        "--weight_decay",
    ]
    places = [text.index(f"\n  {flag} ") for flag in flags]
    assert places == sorted(places)
    assert text.index("--packing") < text.index("model, data and rewards") < text.index("--reward_funcs")


def test_it_begins_with_how_to_use_it_and_not_with_every_flag(text):
    first, *_ = text.splitlines()
    assert first == "usage: grpo-plus train [--config run.yaml] [--FLAG VALUE ...]"
    assert "\n  --advantage_estimator" in "\n".join(text.splitlines()[:25])


def test_every_field_of_ours_has_a_group():
    ours = {entry.name for entry in fields(GRPOPlusConfig)} - {entry.name for entry in fields(GRPOConfig)}
    grouped = [name for names in OURS.values() for name in names]
    assert len(set(grouped)) == len(grouped)
    assert ours <= set(grouped)


def test_no_flag_is_lost(text):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    parser = TrlParser([GRPOScriptArguments, ModelConfig, DatasetMixtureConfig, GRPOPlusConfig])
    expected = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    shown = set(re.findall(r"(?<![\w-])(--\w[\w-]*)", text))
    assert expected <= shown
