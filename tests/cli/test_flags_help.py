import re

import pytest

from grpo_plus import cli


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
        "grpo_plus: advantages, losses, speed, safety",
        "model, data and rewards",
        "GRPO (TRL)",
        "training (transformers)",
    ]
    flags = [
        "--qlora",
        "--advantage_estimator",
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


def test_no_flag_is_lost(text):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    from grpo_plus import GRPOPlusConfig

    parser = TrlParser([GRPOScriptArguments, ModelConfig, DatasetMixtureConfig, GRPOPlusConfig])
    expected = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    shown = set(re.findall(r"(?<![\w-])(--\w[\w-]*)", text))
    assert expected <= shown
