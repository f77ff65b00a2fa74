"""The pages as a site: it builds without a broken link, needs nothing from elsewhere, and documents every public name."""

import importlib
import inspect
import re
import zlib
from html import unescape
from pathlib import Path
from types import FunctionType

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from grpo_plus.advantages import ESTIMATORS, MODIFIERS
from grpo_plus.losses import LOSSES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = (
    "grpo_plus",
    *(f"grpo_plus.{room}" for room in ("advantages", "losses", "rewards", "planner", "qlora", "replay")),
)
FUNCTIONS = [*(table[name].function for table in (ESTIMATORS, LOSSES) for name in table), *MODIFIERS.values()]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. The configuration is strict, so a warning ends the build."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def inventory(site) -> dict[str, str]:
    """Dotted name -> page and anchor, of everything that the API reference documents."""
    packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")[2]
    entries = [line.split(" ") for line in zlib.decompress(packed).decode().splitlines()]
    return {entry[0]: entry[3].replace("$", entry[0]) for entry in entries}


def words(html: str) -> str:
    """What a reader sees of a piece of HTML."""
    return bare(unescape(re.sub(r"<[^>]+>", "", html)))


def bare(text: str) -> str:
    """A text without marks of Markdown, with single blanks."""
    return " ".join(re.sub(r"[`*]|^- ", "", text, flags=re.MULTILINE).split())


def paragraphs(docstring: str) -> list[str]:
    """What a docstring says before its sections (Args, Returns), as `words` gives it."""
    text = re.split(
        r"^(?:Args|Attributes|Examples|Returns|Raises|Yields):$", inspect.cleandoc(docstring), flags=re.MULTILINE
    )[0]
    return [bare(part) for part in text.strip().split("\n\n")]


def entry(site: Path, place: str) -> str:
    """What the reference says about a name: from its heading to the next."""
    page, _, anchor = place.partition("#")
    return (site / page).read_text(encoding="utf-8").partition(f'id="{anchor}"')[2].partition("<h")[0]


def test_the_home_page_leads_to_every_page():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = [page.name for page in DOCS.glob("*.md") if page.name != "index.md"]
    assert len(pages) > 8
    assert [page for page in pages if f"({page}" not in text] == []


def place_of(module: str, name: str, inventory: dict[str, str]) -> str:
    """Where a public name stands. A function that shares its name with its file stands under its own module."""
    home = getattr(getattr(importlib.import_module(module), name), "__module__", module)
    return inventory.get(f"{module}.{name}") or inventory[f"{home}.{name}"]


@pytest.mark.parametrize("module", ROOMS)
def test_the_reference_has_every_public_name_with_its_docstring(site, inventory, module):
    names = [name for name in importlib.import_module(module).__all__ if not name.startswith("_")]
    assert len(names) > 4
    for name in names:
        value, found = getattr(importlib.import_module(module), name), entry(site, place_of(module, name, inventory))
        assert "<p>" in found, name
        if isinstance(value, type | FunctionType):
            assert [part for part in paragraphs(value.__doc__ or "") if part not in words(found)] == [], name


def test_the_reference_has_every_estimator_modifier_and_loss(inventory):
    assert len(FUNCTIONS) > 40
    assert {f"{one.__module__}.{one.__name__}" for one in FUNCTIONS} <= set(inventory)


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon|preconnect)\"?[^>]*href=\"?([^\s\">]+)", text)
        assert loaded
        assert [address for address in loaded if re.match(r"(\w+:)?//", address)] == [], page
