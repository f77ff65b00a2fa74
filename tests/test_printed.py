"""The commands and snippets of the pages, and the examples, run as printed, with the base dependencies alone."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from tests import printed
from tests.base_only import base_distributions, make_base_environment

OURS = [command for command in printed.commands() if printed.of_ours(command) is not None]
OTHERS = [command for command in printed.commands() if printed.of_ours(command) is None]
NEED_AN_EXTRA = [*(command for command in OURS if "--qlora" in command and " train " in command), "qlora_single_gpu.py"]
NEED_NONE = [name for name in (*OURS, "snippets", *printed.EXAMPLES) if name not in NEED_AN_EXTRA]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What became of everything, run once in an environment without extras; and the folder where it ran."""
    folder = tmp_path_factory.mktemp("printed")
    python = make_base_environment(tmp_path_factory.mktemp("base"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-m", "tests.printed", folder], cwd=printed.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text()), folder


def test_the_environment_has_no_extra_and_no_tool_of_the_tests():
    there = set(base_distributions())
    assert {"trl", "torch", "math-verify", "matplotlib"} <= there
    assert there.isdisjoint({"peft", "bitsandbytes", "pytest", "hypothesis", "ruff", "liger-kernel", "playwright"})


@pytest.mark.parametrize("name", NEED_NONE)
def test_it_runs_as_printed_with_the_base_dependencies(ran, name):
    results, _ = ran
    assert results[name]["error"] == "", results[name]["output"][-2000:]


@pytest.mark.parametrize("name", NEED_AN_EXTRA)
def test_what_needs_an_extra_says_which_before_it_loads_anything(ran, name):
    results, _ = ran
    text = results[name]["error"] + results[name]["output"]
    assert "needs bitsandbytes, which is not installed: pip install bitsandbytes peft" in text
    assert "Loading weights" not in text


def rewards_of(output: str) -> list[float]:
    """The rewards of the steps, as a script prints them."""
    return [float(value) for value in re.findall(r"'reward': '?(-?[\d.e-]+)", output)]


def learned(rewards: list[float]) -> bool:
    """Whether the last quarter of the steps is far above the first."""
    part = max(1, len(rewards) // 4)
    return sum(rewards[-part:]) / part > 1.5 * sum(rewards[:part]) / part + 0.1


@pytest.mark.parametrize("name", ["custom_estimator.py", "process_rewards.py", "quickstart.py"])
def test_an_example_learns(ran, name):
    rewards = rewards_of(ran[0][name]["output"])
    assert len(rewards) > 10
    assert learned(rewards), rewards


def test_the_example_of_a_tool_learns_to_call_it(ran):
    shares = re.findall(r"(before|after): (\d+)% of the conversations call .*, (\d+)% of", ran[0]["tools.py"]["output"])
    assert [when for when, *_ in shares] == ["before", "after"]
    (calls, right), (calls_after, right_after) = ([int(share) for share in row[1:]] for row in shares)
    assert max(calls, right) < 40
    assert min(calls_after, right_after) > 60


def test_the_example_of_pictures_learns_to_count_and_to_name_colors(ran):
    output = ran[0]["vision.py"]["output"]
    before, after = (int(re.search(rf"{when}: (\d+)% of 200 held-out", output)[1]) for when in ("before", "after"))
    assert before < 80
    assert after > 90
    assert after > before + 15


def test_both_variants_of_the_example_of_a_comparison_learn(ran):
    results = pd.read_csv(ran[1] / "comparison" / "results.csv")
    scores = results[results["name"] == "digits_reward"]
    start = scores[scores["statistic"] == "start"]["value"].item()
    reached = scores[scores["statistic"] == "held_out"].set_index("variant")["value"]
    assert len(reached) == 2
    assert reached.min() > start + 0.1


def test_the_example_for_one_card_learns_and_exports(tmp_path, monkeypatch, capsys):
    """In this environment, which has the extra."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["qlora_single_gpu.py", "--offline"])
    printed.run_example("qlora_single_gpu.py")
    rewards = rewards_of(capsys.readouterr().out)
    assert learned(rewards), rewards
    assert (tmp_path / "qlora_single_gpu" / "merged" / "model.safetensors").exists()


def test_the_command_for_one_card_runs_with_its_extra(tmp_path, monkeypatch):
    printed.workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    (command,) = NEED_AN_EXTRA[:-1]
    printed.run_command(command)
    assert list(tmp_path.glob("*/adapter_model.safetensors"))


@pytest.mark.parametrize("command", OTHERS)
def test_a_command_that_only_sets_up_names_what_exists(command):
    """`make` and `pip` would build this environment again; what they are told has to be there."""
    program, *words = command.split()
    project = tomllib.loads((printed.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if program == "python":
        assert (printed.ROOT / words[0]).exists()
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (printed.ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[1] == "--no-deps":
        assert words[2] in (printed.ROOT / "examples" / "real_model.py").read_text()
    else:
        assert (program, words[:2]) == ("pip", ["install", "-e"])
        extras = re.findall(r"\[(.*)\]", words[2])
        assert {extra for found in extras for extra in found.split(",")} <= set(project["optional-dependencies"])


def test_a_learning_that_is_none_is_seen():
    assert not learned([0.0] * 12)
    assert not learned([0.2, 0.3] * 6)
    assert learned([0.1, 0.1, 0.3, 0.5])


def test_every_block_of_the_pages_is_run():
    assert len(OURS) >= 9
    assert len(OTHERS) >= 4
    assert len(printed.blocks("python")) >= 4
    assert Path(printed.ROOT, "examples", "quickstart.py").exists()
