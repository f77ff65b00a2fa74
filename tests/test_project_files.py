"""The files around the package: versions and pins that stand in two places agree, and links lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from grpo_plus import __version__
from tests.test_house import FLOORS

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def loaded(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, no punctuation, hyphens for blanks."""
    lines = prose(page).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def prose(page: Path) -> str:
    """A page without its blocks of code, where # is a comment and ]( may be Python."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def broken_links(page: Path) -> list[str]:
    """The relative links of a page to a file, or to a heading of a Markdown file, that does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_relative_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_link_to_nowhere_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A `b`: c\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[1](there.md#a-b-c) [2](gone.md) [3](there.md#no-heading) [4](#own) [5](https://gone.org)\n## Own\n"
    )
    assert broken_links(page) == ["gone.md", "there.md#no-heading"]


def test_the_floors_of_contributing_are_those_of_the_house():
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", CONTRIBUTING.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == len(FLOORS)
    assert {room: int(floor) for floor, room in rows} == FLOORS
    assert [floor for floor, _ in rows] == sorted((floor for floor, _ in rows), reverse=True)


def test_every_path_that_contributing_names_exists():
    named = set(re.findall(r"`((?:grpo_plus|tests|benchmarks)/[^`<]*)`", CONTRIBUTING.read_text(encoding="utf-8")))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def shape_letters(text: str) -> set[str]:
    """Capital letters in what reads as a shape: (P, G), (C*P, G, K), (N,)."""
    size = r"(?:[A-Z](?:\*[A-Z])?|[a-z]+|\d+|\.\.\.)"
    shapes = re.findall(rf"\({size},(?: {size}(?:, {size})*)?\)", text)
    return {letter for shape in shapes for letter in re.findall(r"\b[A-Z]\b", shape)}


def test_the_table_of_shape_letters_has_every_letter_of_the_package_once():
    table = CONTRIBUTING.read_text(encoding="utf-8").split("| letter | counts |")[1].split("\n\n")[0]
    letters = re.findall(r"^\| `(\w)` \|", table, flags=re.MULTILINE)
    used = {
        letter: path.name
        for path in sorted((ROOT / "grpo_plus").rglob("*.py"))
        for letter in shape_letters(path.read_text(encoding="utf-8"))
    }
    assert len(used) > 10
    assert {letter: name for letter, name in used.items() if letter not in letters} == {}
    assert len(letters) == len(set(letters))


def test_a_shape_is_told_from_other_parentheses():
    assert shape_letters("(P, G) of (C*P, 2, K), or (N,); p(A), f(x, y), (An, A)") == {"P", "G", "C", "K", "N"}


def test_the_changelog_and_the_citation_name_the_version_and_its_date():
    released = re.findall(r"^## \[(\d.*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    citation = loaded("CITATION.cff")
    assert released[0] == (__version__, citation["date-released"])
    assert citation["version"] == __version__
    assert citation["license"] == project()["license"]


def test_pre_commit_runs_the_ruff_that_ci_runs():
    (hooks,) = loaded(".pre-commit-config.yaml")["repos"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ruff=={hooks['rev'].removeprefix('v')}" in pins
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_hosted_ci_runs_our_command_on_every_python_that_the_package_names():
    job = loaded(".github/workflows/ci.yml")["jobs"]["test"]
    named = [name.rpartition(" ")[2] for name in project()["classifiers"] if "Python :: 3." in name]
    assert job["strategy"]["matrix"]["python-version"] == named
    assert job["steps"][-1] == {"run": ".ci/run"}


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").iterdir()), ids=lambda path: path.name)
def test_a_workflow_may_only_read_the_repository(workflow):
    assert loaded(str(workflow))["permissions"] == {"contents": "read"}


def test_the_projects_addresses_share_one_home():
    urls = project()["urls"]
    assert set(urls) == {"Homepage", "Repository", "Changelog", "Issues"}
    assert all(address.startswith(urls["Repository"]) for address in urls.values()), urls
