"""The pages under docs/: their examples run, and what they name exists."""

import doctest
import json
import re
from pathlib import Path

import pytest

from grpo_plus.advantages import ESTIMATORS
from grpo_plus.losses import LOSSES, TRL_LOSSES
from tests.readme import gpu_rows

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
PAGES = sorted(DOCS.glob("*.md"))


class Markdown(doctest.DocTestParser):
    """Doctest takes what follows an example for its output, up to an empty line: a closing fence has to be one."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^```.*$", "", string, flags=re.MULTILINE), name)


def run(page: Path) -> doctest.TestResults:
    with ESTIMATORS.temporarily(), LOSSES.temporarily():  # a page may register functions
        return doctest.testfile(str(page), module_relative=False, parser=Markdown(), encoding="utf-8")


def estimators_of_the_table(text: str) -> set[str]:
    """The names in the column headed "take"."""
    table = text.split("| situation | take |")[1].split("\n\n")[0]
    cells = [line.split("|")[2] for line in table.splitlines()[2:]]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>>" in page.read_text(encoding="utf-8")], ids=lambda page: page.name
)
def test_a_pages_examples_print_what_it_says(page):
    failed, attempted = run(page)
    assert attempted > 0
    assert failed == 0


def test_a_wrong_figure_is_noticed(tmp_path, capsys):
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    page = tmp_path / "wrong.md"
    page.write_text(text.replace("(0.1564, 0.1514)\n```", "(0.1564, 0.1515)\n```"), encoding="utf-8")
    assert run(page).failed == 1
    assert "0.1515" in capsys.readouterr().out


def test_the_table_names_estimators_that_exist():
    named = estimators_of_the_table((DOCS / "choosing.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert named <= set(ESTIMATORS)


def test_the_quoted_intervals_are_those_of_the_multitask_benchmark():
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"[+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]", text))
    results = DOCS.parent / "benchmarks" / "results" / "multitask"
    summaries = [(results / path).read_text(encoding="utf-8") for path in ("summary.md", "second/summary.md")]
    assert len(quoted) > 3
    assert [figure for figure in quoted if not any(figure in summary for summary in summaries)] == []


def test_the_quoted_errors_of_sweeps_are_those_of_the_benchmark():
    text = (DOCS / "compare.md").read_text(encoding="utf-8")
    results = json.loads((DOCS.parent / "benchmarks" / "results" / "sweep.json").read_text(encoding="utf-8"))
    shape = [row for row in results["rows"] if (row["settings"], row["seeds"]) == (9, 8)]
    for way in ("all with all", "other items", "other folds", "other seeds"):
        alike, one_sided = (row for row in shape if row["way"] == way)  # luck is the same in both
        quoted = f"| {alike['too_high']:.3f} | {100 * alike['missed']:.1f} % | {100 * one_sided['missed']:.1f} % |"
        assert quoted in text


def test_the_readme_is_short():
    """A reader has the first ten minutes for it; what is longer has a page."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_counts_what_the_registries_hold():
    said = README.read_text(encoding="utf-8")
    assert f"TRL's, {len(ESTIMATORS)} by name" in said
    assert f"TRL's {len(TRL_LOSSES)}, {len(LOSSES) - len(TRL_LOSSES)} more" in said


def test_the_readmes_figures_of_speed_are_the_results():
    said = README.read_text(encoding="utf-8")
    steps = json.loads((README.parent / "benchmarks" / "results" / "step.json").read_text(encoding="utf-8"))["cases"]
    ratios = [case["speed_up"] for case in steps.values()]
    assert said.count(f"{min(ratios):.1f} to {max(ratios):.1f} times as fast") == 2
    on_gpu = [float(figure) for row in gpu_rows() for cell in row for figure in re.findall(r"(\d\.\d\d)x", cell)]
    assert said.count(f"{min(on_gpu):.2f} to {max(on_gpu):.2f} times") == 2


def test_the_readmes_figures_of_the_demo_are_the_results():
    demo = json.loads((README.parent / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    said = f"at most {demo['highest_before'] * 100:.1f} % to at least {demo['lowest_after'] * 100:.1f} %"
    assert said in " ".join(README.read_text(encoding="utf-8").split())
    assert len(demo["runs"]) == 5
