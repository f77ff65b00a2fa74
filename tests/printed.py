"""What the pages print, run as it stands there: their commands, their snippets, and the examples beside them.

    python -m tests.printed FOLDER

runs all of them in this environment, inside FOLDER, and writes what became of each into FOLDER/results.json. Hub names
are folders here: a tiny model, and rows in the form of the data set. Flags that shorten a run are added at the end.
"""

import json
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("quickstart.md", "estimators.md", "losses.md")))
# Those that say how they run in seconds.
PRETRAINED = "real_model.py"  # needs weights that no test can wait for; tests/test_real_model.py has its parts
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != PRETRAINED)
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-1.7B")
PLANNED = "Qwen/Qwen3-4B"
DATA = "trl-lib/DeepMath-103K"
ROWS = 8
CPU = ["--use_cpu", "--bf16", "False", "--report_to", "none"]
SHORT = ["--max_steps", "1", "--max_completion_length", "8", "--num_generations", "4"]
SHORT += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", *CPU]
EVALUATED = ["--per_device_eval_batch_size", "4"]
# What is added to a command, by its first words; the first that fit count.
ADDED = {
    "train --help": [],
    "train": SHORT,
    "watch": ["--once"],
    "compare --seeds 5": ["--seeds", "1", "--num_held_out", "2", "--output_dir", "own", *SHORT, *EVALUATED],
    "compare": ["--seeds", "1", "--estimators", "grpo,rloo", "--max_steps", "1", "--num_held_out", "4"],
}
YAML = f"""model_name_or_path: {MODELS[0]}
dataset_name: {DATA}
reward_funcs: [accuracy_reward]
output_dir: out
"""


def blocks(language: str) -> list[str]:
    """The pages' blocks of code in a language."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    return [
        block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.M)
    ]


def commands() -> list[str]:
    """The pages' commands, a line each; a command that stands on two pages, once."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()))


def of_ours(command: str) -> list[str] | None:
    """The words after `grpo-plus`, or after `-m grpo_plus`; None for another program's command."""
    words = shlex.split(command)
    if words[0] == "grpo-plus":
        return words[1:]
    return words[words.index("grpo_plus") + 1 :] if "grpo_plus" in words else None


def workplace(folder: Path) -> None:
    """What the commands name: models, data, a finished run, a file of settings."""
    from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
    from tests.planner.configs import QWEN3_4B
    from tests.replay.logs import write_rewards

    tokenizer = tiny_tokenizer()
    for name in MODELS:
        tokenizer.save_pretrained(folder / name)
        tiny_model(tokenizer, hidden_size=16, num_layers=1, num_heads=1).save_pretrained(folder / name)
    (folder / PLANNED).mkdir(parents=True)
    (folder / PLANNED / "config.json").write_text(json.dumps(QWEN3_4B))
    (folder / DATA).mkdir(parents=True)
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "solution": str(n + 1)} for n in range(ROWS)]
    (folder / DATA / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(YAML)
    for step in (1, 2):
        write_rewards(folder / "runs" / "mine", step, {"r": [1.0, 0.0, 0.5, 0.0]})


def run_command(command: str) -> None:
    """Run a command of ours as the shell would, in this process."""
    from grpo_plus import cli

    words = of_ours(command) or []
    added = next((flags for start, flags in ADDED.items() if shlex.join(words).startswith(start)), [])
    try:
        status = cli.main([*words, *added])
    except SystemExit as ended:  # so --help ends
        status = ended.code
    if status and words[0] != "plan":  # where 1 means that the run does not fit
        raise SystemExit(f"exit status {status}")


def run_snippets() -> None:
    """Run the pages' Python, block after block, as one script; `grade` is the reader's own."""
    from trl import GRPOConfig

    names: dict[str, Any] = {
        "__name__": "printed",
        "grade": lambda ids: ([[1.0] * len(row) for row in ids], [list(range(len(row))) for row in ids]),
    }
    shortened = {"max_completion_length": 8, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    defaults = {name: (GRPOConfig.__dataclass_fields__[name], value) for name, value in shortened.items()}
    post_init = GRPOConfig.__post_init__

    def short(self: Any) -> None:
        for name, (entry, value) in defaults.items():
            if getattr(self, name) == entry.default:
                setattr(self, name, value)
        post_init(self)

    GRPOConfig.__post_init__ = short
    try:
        for block in blocks("python"):
            if block.startswith(">>> "):  # test_docs has these
                continue
            exec(compile(block, "page", "exec"), names)
        logged: dict[str, list] = {}
        assert names["graded"]([[1, 2], [3]], logged.__setitem__) == [2.0, 1.0]
        assert logged["step_ends"] == [[0, 1], [0]]
        said = [("assistant", "look"), ("tool", "a door\n+1"), ("assistant", "done")]
        messages = [{"role": role, "content": content} for role, content in said]
        assert names["played"]([messages], logged.__setitem__) == [1.0]
        assert logged["step_states"] == [["start", "a door"]]
    finally:
        GRPOConfig.__post_init__ = post_init


def run_example(name: str) -> None:
    """Run an example as a script, offline."""
    script = ROOT / "examples" / name
    sys.argv = [name, "--offline"] if "--offline" in script.read_text(encoding="utf-8") else [name]
    runpy.run_path(str(script), run_name="__main__")


def outcome(work: Callable[[], None]) -> dict[str, str]:
    """What `work` printed, and the error that ended it; "" where none did."""
    from grpo_plus.advantages import ESTIMATORS

    printed = StringIO()
    error = ""
    with redirect_stdout(printed), redirect_stderr(printed), ESTIMATORS.temporarily():
        try:
            work()
        except (Exception, SystemExit):
            error = traceback.format_exc()
    return {"error": error, "output": printed.getvalue()}


def main(folder: Path) -> None:
    """Run everything and write what became of it."""
    from grpo_plus.cli import demo_task

    warmed_up = demo_task.warmed_up_model
    demo_task.warmed_up_model = lambda tokenizer, seed, steps: warmed_up(tokenizer, seed, 2)
    workplace(folder)
    results: dict[str, dict[str, str]] = {}
    with chdir(folder):
        for command in commands():
            if of_ours(command) is not None:
                results[command] = outcome(lambda command=command: run_command(command))
        results["snippets"] = outcome(run_snippets)
        for name in EXAMPLES:
            results[name] = outcome(lambda name=name: run_example(name))
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
