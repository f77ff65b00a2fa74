"""An environment that holds the package and what it declares as its dependencies, and nothing else.

It is a virtual environment of its own, laid over this one: its site-packages are links to the files of the base
dependencies and of theirs. What an extra brings (peft, bitsandbytes), and what only tests need, is not there.
"""

import sys
import tomllib
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for: the dependencies, and those of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [found for found in map(Requirement, texts) if found.name != project["name"]]


def base_distributions() -> dict[str, Distribution]:
    """The distributions that `pip install .` brings, by name."""
    return distributions(declared())


def distributions(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """What is installed for these requirements, with all that they require in turn, by name."""
    found: dict[str, Distribution] = {}
    pending = list(requirements)
    while pending:
        requirement = pending.pop()
        if requirement.name.lower() in found or not _holds(requirement):
            continue
        try:
            wanted = distribution(requirement.name)
        except PackageNotFoundError:  # torch names packages of CUDA that its CPU build goes without
            continue
        found[requirement.name.lower()] = wanted
        inner = [Requirement(text) for text in wanted.requires or ()]
        pending += [each for each in inner if _holds(each, requirement.extras)]
    return found


def _holds(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def make_base_environment(folder: Path, *tools: str) -> Path:
    """Make the environment in `folder`, with tools by name beside the base dependencies. Returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    for found in distributions([*declared(), *map(Requirement, tools)]).values():
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            link, target = packages / top, Path(str(found.locate_file(top)))
            if not link.exists() and target.exists():
                link.symlink_to(target)
    (packages / "grpo_plus.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    _own_metadata(packages)
    return folder / "bin" / "python"


def _own_metadata(packages: Path) -> None:
    """What `importlib.metadata` says of this package: it is read from the checkout, which need not be installed."""
    from grpo_plus import __version__

    metadata = packages / f"grpo_plus-{__version__}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.4\nName: grpo_plus\nVersion: {__version__}\n")
