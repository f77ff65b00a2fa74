import argparse
import json

import pytest

from grpo_plus.cli.compare import add_arguments, given_flags
from grpo_plus.cli.next_command import NextCommand, without_secrets
from grpo_plus.compare.conclusion import NextStep
from grpo_plus.compare.plan import Variant

OWN = ["--model_name_or_path", "my model", "--reward_funcs", "mine.right", "--hub_token", "secret", "--bf16"]


def command(flags, rest, variants):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return NextCommand(given_flags(parser.parse_args(flags)), rest, variants)


def test_more_seeds_of_two_keep_every_other_flag():
    flags = ["--estimators", "grpo,passk,gdpo", "--max_steps", "40", "--seeds", "3", "--baseline", "grpo"]
    flags += ["--advantage_kwargs", json.dumps({"passk": {"k": 2}})]
    variants = [Variant("grpo"), Variant("passk", fields={"advantage_kwargs": {"k": 2}}), Variant("gdpo")]
    typed = command(flags, OWN, variants)(NextStep("", (variants[1].label, "gdpo"), 8))
    assert typed == (
        "grpo-plus compare --model_name_or_path 'my model' --reward_funcs mine.right --hub_token '***' --bf16 "
        """--estimators passk,gdpo --seeds 8 --advantage_kwargs '{"passk": {"k": 2}}' --max_steps 40"""
    )


@pytest.mark.parametrize(("rest", "begins"), [
    (OWN, "grpo-plus train --model_name_or_path 'my model' --reward_funcs mine.right --hub_token '***' --bf16 "
          "--max_steps 40 "),
    ([], "grpo-plus train --model_name_or_path MODEL --dataset_name DATASET --reward_funcs MODULE.FUNCTION "),
], ids=["own", "demo"])  # fmt: skip
def test_the_winner_is_trained_with_what_its_variant_sets(rest, begins):
    winner = Variant("passk", "dapo", fields={"advantage_kwargs": {"k": 2}})
    typed = command(["--max_steps", "40"], rest, [Variant("grpo"), winner])(NextStep("", winner=winner.label))
    assert typed == (begins + """--advantage_estimator passk --loss_type dapo --advantage_kwargs '{"k": 2}'""")


def test_a_step_without_variants_has_no_command():
    assert command([], [], [Variant("grpo")])(NextStep("Take more steps.")) == ""


def test_secrets_are_masked_however_they_are_written():
    words = ["--hub_token=abc", "--hub_token", "abc", "--pad_token", "<pad>", "https://me:pass@host", "hf_" + "a" * 20]
    assert without_secrets(words) == [
        "--hub_token=***", "--hub_token", "***", "--pad_token", "<pad>", "https://***@host", "***",
    ]  # fmt: skip
