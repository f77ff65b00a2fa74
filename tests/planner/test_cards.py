import json

import pytest

from grpo_plus import cli
from grpo_plus.planner import card
from tests.planner.configs import QWEN3_4B

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4090", 24), ("RTX 4090", 24), ("NVIDIA GeForce RTX 4090", 24), ("rtx-4090", 24), ("rtx 3060", 12), ("T4", 16),
        ("Tesla T4", 16), ("a100", 40), ("A100 80GB", 80), ("a100-80gb", 80), ("A100-SXM4-80GB", 80),
        ("rtx 4060 ti 16gb", 16), ("H200", 141), ("RTX 6000 Ada", 48), ("7900 XTX", 24), ("4090 laptop", 16),
        ("12", 12), ("80", 80), ("12GB", 12), ("12 gib", 12), ("24576MB", 24), ("1.5", 1.5), ("0.5TB", 512), ("8g", 8),
    ],
)  # fmt: skip
def test_names_and_sizes(text, size):
    assert card(text).size == size * GIB


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4091", "'4091' is no known card. Did you mean '4090'"),
        ("rtx 9999", "is no known card"),
        ("24576", "is no known card.*A size has a unit"),
        ("0", "is not above 0"),
        ("-8GB", "is not above 0"),
        ("big", "'big' is no known card.*Write its memory, for example 24GB"),
        ("12 apples", "no known card"),
        ("", "no known card"),
    ],
)
def test_what_is_neither_says_what_to_write(text, message):
    with pytest.raises(ValueError, match=message):
        card(text)


def test_a_card_that_is_sold_in_two_sizes_says_so(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    assert cli.main(["plan", str(tmp_path), "--qlora", "--gpu", "rtx 3060"]) == 0
    output = capsys.readouterr().out
    assert "rtx 3060: 12 GB; also sold with 8: --gpu 'rtx 3060 8GB'" in output
    assert "of the card's 12 are usable" in output
