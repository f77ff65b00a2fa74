import argparse
import inspect
import json
import subprocess
import sys
from functools import partial

import pytest

from grpo_plus.cli import demo
from grpo_plus.demo import run


def parse(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


def test_flags_default_to_what_run_demo_defaults_to():
    defaults = {name: entry.default for name, entry in inspect.signature(run.run_demo).parameters.items()}
    flags = vars(parse())
    assert flags.pop("output_dir") == "grpo_plus_demo"
    assert flags == {
        name: defaults[name] for name in ("advantage_estimator", "loss_type", "qlora", "seed", "max_steps")
    }


def test_it_prints_a_table_and_what_to_try_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_demo", partial(run.run_demo, warm_up_steps=2))
    output_dir = tmp_path / "demo"
    flags = "--advantage_estimator", "dr_grpo", "--loss_type", "grpo", "--seed", "1", "--max_steps", "2"
    assert demo.run(parse(*flags, "--output_dir", str(output_dir)), []) == 0
    printed = capsys.readouterr()
    summary = json.loads((output_dir / "summary.json").read_text())
    assert (summary["seed"], summary["steps"]) == (1, 2)
    assert (summary["switches"]["advantage_estimator"], summary["switches"]["loss_type"]) == ("dr_grpo", "grpo")
    assert "before GRPO" in printed.out
    assert "after 2 steps" in printed.out
    assert summary["examples"][0]["prompt"].strip() in printed.out
    assert str(output_dir) in printed.out
    assert f"grpo-plus replay {output_dir}" in printed.out
    assert "--advantage_estimator rloo" in printed.out  # another than the one that was used
    assert "{'loss'" not in printed.out + printed.err  # no dictionary per step
    assert "GRPO: 100%" in printed.err


def test_an_error_leaves_as_itself(tmp_path):
    with pytest.raises(ValueError, match="dr_grop"):
        demo.run(parse("--advantage_estimator", "dr_grop", "--output_dir", str(tmp_path)), [])


def test_help_loads_neither_torch_nor_trl():
    code = (
        "import argparse, sys; from grpo_plus.cli import demo; demo.add_arguments(argparse.ArgumentParser()); "
        "sys.exit(bool({'torch', 'trl', 'transformers', 'matplotlib', 'rich'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
