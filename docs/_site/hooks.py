"""What mkdocs does beyond its own: the API reference, and files from outside of docs/ that pages link to.

Pages link to examples, results and sources by their place in the repository, as on GitHub. The site has to be whole
without the repository, so every linked file becomes a part of the site, under repository/.
"""

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = "repository"
BLOCK_OF_CODE = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\(|src=\"|srcset=\")(?!\w+:|#)([^)\s\"#]+)")
NOTEBOOK = ".ipynb"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", "": ""}
STARTS = ("CONTRIBUTING.md", "CHANGELOG.md")
ESTIMATORS = ("group", "unnormalized", "batch", "binary", "ranking", "multi_reward", "running", "process", "turns")
OF_REWARDS = ("modifiers.gate", "selection.pods", "selection.gfpo", "modifiers.alp", "kl_penalty.kl_in_reward")
MODIFIERS = (*OF_REWARDS, "modifiers.difficulty", "modifiers.filter_zero_std", "modifiers.clip")
LOSSES = ("clipped", "reweighted", "sequence", "smooth", "covariance", "divergence", "demonstrations")

# A page of the API reference: its title, and the modules whose public names it lists.
API = {
    "trainer": ("Trainer, config, callbacks", ["grpo_plus"]),
    "advantages": ("Advantages", ["grpo_plus.advantages"]),
    "estimators": ("Every estimator", [f"grpo_plus.advantages.{family}" for family in ESTIMATORS]),
    "modifiers": ("Every modifier", [f"grpo_plus.advantages.{name}" for name in MODIFIERS]),
    "losses": ("Losses", ["grpo_plus.losses"]),
    "every_loss": ("Every loss", [f"grpo_plus.losses.{family}" for family in LOSSES]),
    "rewards": ("Reward functions", ["grpo_plus.rewards"]),
    "planner": ("Planner", ["grpo_plus.planner"]),
    "qlora": ("QLoRA", ["grpo_plus.qlora"]),
    "replay": ("Replay", ["grpo_plus.replay"]),
    "compare": (
        "Compare",
        [f"grpo_plus.compare.{file}" for file in ("task", "plan", "train", "sweep", "choices", "comparison", "report")],
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the API reference, and every file outside of docs/ that a page leads to."""
    for name, (title, modules) in API.items():
        text = "\n\n".join([f"# {title}", *map(reference, modules)])
        files.append(File.generated(config, f"api/{name}.md", content=text))
    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages() if file.src_dir}
    for path in sorted(linked_files(pages)):
        files.append(file_of(path, config))
    return files


def reference(module: str) -> str:
    """The directives that show a module: its docstring, then each name of its `__all__`, or what it defines itself."""
    names = public_homes(module)
    if not names:
        return directive(module, show_root_heading=True)
    shown = [directive(home, show_root_heading=True) for home in names.values()]
    return "\n\n".join([directive(module, members=False), *shown])


def directive(name: str, **options: bool) -> str:
    """What tells mkdocstrings to show a name."""
    return "\n".join([f"::: {name}", "    options:", *(f"      {key}: {value}" for key, value in options.items())])


def public_homes(module: str) -> dict[str, str]:
    """The names of a module's `__all__`, and where each is defined; read without an import."""
    package = ROOT / module.replace(".", "/") / "__init__.py"
    if not package.exists():
        return {}
    source = package.read_text(encoding="utf-8")
    names: list[str] = []
    homes: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    # What most readers came for stands first.
    names.sort(key=lambda name: not name.startswith("GRPOPlus"))
    return {name: homes.get(name, f"{module}.{name}") for name in names}


def linked_files(pages: dict[str, str]) -> set[str]:
    """Files outside of docs/ that the pages lead to, directly or through each other."""
    found = set(STARTS)
    waiting = [*pages.items(), *((name, read(name)) for name in STARTS)]
    while waiting:
        home, text = waiting.pop()
        for path in {place(home, link) for _, link in LINK.findall(prose(text))} - found:
            if (ROOT / path).is_file() and not path.startswith("docs/"):
                found.add(path)
                if path.endswith((".md", NOTEBOOK)):
                    waiting.append((path, notebook(path) if path.endswith(NOTEBOOK) else read(path)))
    return found


def file_of(path: str, config: MkDocsConfig) -> File:
    """A file of the repository as a file of the site: code and notebooks as pages, anything else as it is."""
    target, suffix = site_uri(path), Path(path).suffix
    if suffix == NOTEBOOK:
        return File.generated(config, target, content=notebook(path))
    if suffix in LANGUAGES:
        fence = f"# {path}\n\n````{LANGUAGES[suffix]}\n{read(path)}\n````\n"
        return File.generated(config, target, content=fence)
    return File.generated(config, target, abs_src_path=str(ROOT / path))


def notebook(path: str) -> str:
    """A notebook of the repository as Markdown: its texts, its code, and what it printed and drew."""
    parts: list[str] = []
    for cell in json.loads(read(path))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """One output of a cell: a picture where there is one, or its text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![figure](data:image/png;base64,{data['image/png'].strip()})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links by place in the repository into links by place in the site."""
    uri = page.file.src_uri
    home = uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(OUTSIDE) else f"docs/{uri}"
    parts = BLOCK_OF_CODE.split(markdown)
    return "".join(as_session(part) if part.startswith("```") else relinked(part, home, uri) for part in parts)


def relinked(text: str, home: str, uri: str) -> str:
    """`text` of the page `home` with its links as the page `uri` of the site needs them."""

    def moved(match: re.Match[str]) -> str:
        before, link = match.groups()
        return before + posixpath.relpath(site_uri(place(home, link)), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, text)


def as_session(block: str) -> str:
    """A block of Python that shows a session, marked as one: prompts and output then have colors of their own."""
    return block.replace("```python\n>>>", "```pycon\n>>>", 1)


def place(home: str, link: str) -> str:
    """Path in the repository of what the page `home` links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def site_uri(path: str) -> str:
    """Source path in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}.md" if Path(path).suffix in {*LANGUAGES, NOTEBOOK} else f"{OUTSIDE}/{path}"


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return BLOCK_OF_CODE.sub("", text)


def read(path: str) -> str:
    """Text of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")
