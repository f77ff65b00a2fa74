"""The notebooks run, every cell of them, with a tiny model and a few rows in GSM8K's form."""

import ast
import json
import re
import tomllib

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from tests.notebooks import NAMES, OF_THE_DEMO, ROOT, errors, read, run, shown, tagged
from tests.recipes import read as recipe

QLORA, (OWN, WHICH) = "qlora_gsm8k.ipynb", OF_THE_DEMO
ROW = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many in all?",
    "answer": "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72 in all.\n#### 72",
}
CHECKED = "names of the others"  # a last notebook, which looks at the machinery of this test


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebooks with their outputs, and the folder that they ran in."""
    folder = tmp_path_factory.mktemp("notebooks")
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=64, num_layers=1, num_heads=1)
    tokenizer.save_pretrained(folder / "tiny")
    model.save_pretrained(folder / "tiny")
    write_gsm8k(folder / "gsm8k")
    short = {"MAX_STEPS": 2, "WARM_UP_STEPS": 2}
    values = {
        QLORA: {"MODEL": str(folder / "tiny"), "DATASET": str(folder / "gsm8k"), "MAX_STEPS": 2}
        | {"MAX_COMPLETION_LENGTH": 8, "NUM_HELD_OUT": 2},
        OWN: short,
        WHICH: short,
    }
    books = {name: read(name) for name in values}
    assert all({*given} <= parameters(books[name]).keys() for name, given in values.items())
    cells = [new_code_cell("assert 'task' not in globals()"), new_code_cell("1 / 0")]
    books[CHECKED] = new_notebook(cells=cells)
    run(books, values, folder)
    return books, folder


def write_gsm8k(folder):
    """A data set in the form of openai/gsm8k: the configuration "main", with a problem to train on and one to test on."""
    (folder / "main").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "main" / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    files = [{"split": split, "path": f"main/{split}.jsonl"} for split in ("train", "test")]
    configs = json.dumps([{"config_name": "main", "data_files": files}])  # JSON is YAML, too
    (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")


def parameters(book):
    """What the notebook's own cell of parameters sets."""
    names = {}
    exec(tagged(book, "parameters").source, names)
    return {name: value for name, value in names.items() if name.isupper()}


def assigned(book, name, names):
    """The value that a cell of a notebook gives to a name, computed from other names."""
    sources = [cell.source for cell in book.cells if cell.cell_type == "code" and not cell.source.startswith("%")]
    statements = [statement for source in sources for statement in ast.parse(source).body]
    (found,) = (one for one in statements if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == name)
    return eval(ast.unparse(found.value), dict(names))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(ran, name):
    assert errors(ran[0][name]) == []


def test_a_cell_that_fails_is_seen_and_a_notebook_begins_without_names(ran):
    assert errors(ran[0][CHECKED]) == ["ZeroDivisionError: division by zero"]


def test_the_notebook_for_one_card_judges_and_exports(ran):
    books, folder = ran
    assert (folder / QLORA / "qlora_gsm8k" / "merged" / "model.safetensors").exists()
    assert shown(books[QLORA], "rewards").startswith("[1.0] So \\boxed{18}.\n[1.0] So \\boxed{18.00}")
    assert shown(books[QLORA], "data").startswith(ROW["question"])
    assert "eval_pass@4: 0.000 before, 0.000 after" in shown(books[QLORA], "after")
    assert re.search(r"peak: \d.*\nIt fits\.", shown(books[QLORA], "plan"))


def test_the_notebook_on_estimators_knows_what_the_run_trained_with(ran):
    read_log = shown(ran[0][WHICH], "replay")
    assert read_log.startswith("32 groups under ")
    assert "The run trained on the advantages of grpo" in read_log


def test_the_notebooks_own_parts_are_checked_and_train(ran):
    book = ran[0][OWN]
    assert shown(book, "loss-check") == "equal: fresh\nequal: without a limit\n"
    assert shown(book, "curve").startswith("bent/distance, at most ")
    # In the committed run the model learns, and a batch that is used again has other ratios than 1.
    assert float(shown(read(OWN), "curve").removeprefix("bent/distance, at most ")) > 0


def test_the_notebook_for_one_card_has_the_settings_of_its_recipe():
    book = read(QLORA)
    given = parameters(book)
    _, _, model, _, config = recipe("gsm8k_8gb.yaml")
    assert (given["MODEL"], given["MAX_STEPS"]) == (model.model_name_or_path, config.max_steps)
    sizes = assigned(book, "SIZES", given)
    assert sizes == {name: getattr(config, name) for name in sizes}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_first_what_to_set_and_installs_what_exists(name):
    book = read(name)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code[:2] == [tagged(book, "parameters"), tagged(book, "install")]
    (extra,) = re.findall(r'^%pip install --quiet "\{PROJECT\}(?:\[(\w+)\])?"$', code[1].source)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in {"", *project["optional-dependencies"]}
    assert (ROOT / "examples" / "notebooks" / parameters(book)["PROJECT"] / "pyproject.toml").exists()


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_the_demos_and_name_no_place_of_a_machine(name):
    outputs = [output for cell in read(name).cells for output in cell.get("outputs", ())]
    assert bool(outputs) == (name in OF_THE_DEMO)
    assert re.findall(r"/(?:home|root|tmp|Users|usr|opt)/|\\x1b", str(outputs)) == []
    assert all(output.get("name") != "stderr" for output in outputs)
