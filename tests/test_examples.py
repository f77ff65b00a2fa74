"""The examples as texts; tests/test_printed.py runs them."""

import ast
from pathlib import Path

from trl import GRPOTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_quickstart_is_trls_own_example_but_for_one_import():
    documentation = GRPOTrainer.__doc__.split("```python")[1].split("```")[0]
    example = "\n".join(line.strip()[4:] for line in documentation.splitlines() if line.strip())
    theirs = {ast.unparse(node) for node in ast.parse(example).body}
    script = ast.parse((EXAMPLES / "quickstart.py").read_text())
    main = next(node for node in script.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    ours = {ast.unparse(node) for node in (*script.body, *main.body)}
    assert theirs - ours == {"from trl import GRPOTrainer"}
    assert "from grpo_plus import GRPOPlusTrainer as GRPOTrainer" in ours
