import subprocess
import sys

import pytest

import grpo_plus
from tests.readme import PAGES, README, TABLES, block, rendered


def test_importing_the_package_loads_nothing_heavy_and_changes_nothing():
    code = "import sys, grpo_plus; print(sorted({'torch', 'trl', 'transformers', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_importing_the_trainer_leaves_trl_as_it_was():
    code = """
from trl import GRPOConfig, GRPOTrainer
before = dict(vars(GRPOTrainer)), dict(vars(GRPOConfig))
from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
print((dict(vars(GRPOTrainer)), dict(vars(GRPOConfig))) == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("True\n")


@pytest.mark.parametrize("name", grpo_plus.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(grpo_plus, name)
    assert isinstance(value, str) or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GRPOMinusTrainer'"):
        _ = grpo_plus.GRPOMinusTrainer


@pytest.mark.parametrize("kind", TABLES)
def test_the_pages_tables_are_those_of_registries_and_results(kind):
    assert any(block(kind) in page.read_text(encoding="utf-8") for page in PAGES), "run `python -m tests.readme`"


def test_rendering_repairs_a_stale_table():
    assert block("losses") in rendered("a\n<!-- losses -->\nstale\n<!-- /losses -->\nb")


def test_the_readme_has_no_blanks_left():
    assert "@@" not in README.read_text()
