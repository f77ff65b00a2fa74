"""A folder that somebody sent may hold modules: none of them runs unless the user has typed its name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_plus import cli
from grpo_plus.cli.own_modules import OwnModules, search_own_modules
from tests.replay.logs import write_rewards

ROOT = Path(__file__).parents[2]
TRAP = "import pathlib\npathlib.Path({marker!r}).touch()\nraise SystemExit('the trap has run')\n"
# Installed modules, and modules that libraries look for and do without.
TRAPS = ("matplotlib", "pandas", "numpy", "rich", "trl", "peft", "vllm", "flash_attn", "wandb", "comet_ml", "my_trap")


@pytest.fixture
def received(tmp_path):
    """A run's folder with a log, an estimator of the user's, and modules under well-known names."""
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 0.5, 0.0]}, advantage=[0.5, -0.5, 0.25, -0.25])
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(TRAP.format(marker=str(tmp_path / f"ran_{name}")))
    (tmp_path / "beside.py").write_text("FACTOR = 2.0\n")
    (tmp_path / "later.py").write_text("ONE = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "from beside import FACTOR\n\n\ndef twice(rewards):\n    import later\n    return later.ONE * FACTOR * rewards.total()\n"
    )
    return tmp_path


def run(folder, *words):
    """The command in a process of its own, in which nothing is imported yet."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHONPATH": str(ROOT)
    }
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "start", [["-c", "import sys; sys.path.pop(0); from grpo_plus.cli import main; sys.exit(main())"], ["-m", "grpo_plus"]],
    ids=["command", "module"],
)  # fmt: skip
def test_a_received_folder_runs_nothing_but_what_was_typed(received, start):
    done = run(received, *start, "replay", ".", "--estimators", "dr_grpo,mine.twice")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in received.glob("ran_*")) == []
    assert "mine.twice" in (received / "grpo_plus_replay" / "results.csv").read_text()


def test_what_is_installed_goes_before_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colorsys.py").write_text("raise SystemExit('shadowed')\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    search_own_modules(["colorsys.rgb_to_hsv"])
    import colorsys

    assert Path(colorsys.__file__).parent != tmp_path


def test_a_name_without_a_dot_searches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("x = 1\n")
    before = list(sys.meta_path)
    search_own_modules(["mine", None, "dr_grpo"])
    assert sys.meta_path == before
    assert OwnModules(str(tmp_path), {"other"}).find_spec("mine") is None
    assert OwnModules(str(tmp_path), {"mine"}).find_spec("mine").origin == str(tmp_path / "mine.py")


def test_a_config_file_may_name_a_module_too(workplace, capsys):
    (workplace / "my_estimators.py").write_text("def zero(rewards):\n    return 0 * rewards.total()\n")
    lines = ["model_name_or_path: model", "dataset_name: data", "reward_funcs: [my_rewards.nothing]"]
    (workplace / "run.yaml").write_text("\n".join([*lines, "advantage_estimator: my_estimators.zero", "use_cpu: true"]))
    assert cli.main(["train", "--config", "run.yaml", "--bf16", "False"]) == 1
    assert "'my_rewards' has no function 'nothing'" in capsys.readouterr().err
    assert str(workplace) not in sys.path
