import ast
import runpy
import sys
from pathlib import Path

import pytest
from trl import GRPOTrainer

from grpo_plus.advantages import ESTIMATORS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_it_runs_offline(tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--offline"])
    with ESTIMATORS.temporarily():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    assert "train_loss" in output or "report.html" in output


def test_the_quickstart_is_trls_own_example_but_for_one_import():
    documentation = GRPOTrainer.__doc__.split("```python")[1].split("```")[0]
    example = "\n".join(line.strip()[4:] for line in documentation.splitlines() if line.strip())
    theirs = {ast.unparse(node) for node in ast.parse(example).body}
    script = ast.parse((EXAMPLES / "quickstart.py").read_text())
    main = next(node for node in script.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    ours = {ast.unparse(node) for node in (*script.body, *main.body)}
    assert theirs - ours == {"from trl import GRPOTrainer"}
    assert "from grpo_plus import GRPOPlusTrainer as GRPOTrainer" in ours
