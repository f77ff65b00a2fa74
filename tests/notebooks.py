"""Runs the notebooks of examples/notebooks, one after the other in one kernel of this interpreter.

    python -m tests.notebooks

writes the outputs anew of the notebooks that train on the demo's task. A tiny model's outputs of the others would say
nothing about the model that they are for, so these notebooks keep none.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
OF_THE_DEMO = ("own_estimator_and_loss.ipynb", "which_estimator.ipynb")


def read(name: str) -> NotebookNode:
    """A notebook of the repository."""
    return nbformat.read(FOLDER / name, as_version=4)


def tagged(book: NotebookNode, tag: str) -> NotebookNode:
    """The one cell with a tag."""
    (cell,) = (cell for cell in book.cells if tag in cell.metadata.get("tags", ()))
    return cell


def run(books: Mapping[str, NotebookNode], values: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Run notebooks, each in a folder of its own below `folder`, and put the outputs into their cells.

    One kernel does it, because importing takes longer than all else. Between two notebooks it forgets every name.

    Args:
        values: by notebook, what its parameters are set to, after its own cell of parameters.
    """
    cells: list[NotebookNode] = []
    copies: list[tuple[NotebookNode, NotebookNode]] = []
    for name, book in books.items():
        (folder / name).mkdir()
        cells.append(new_code_cell(f"import os\nos.chdir({str(folder / name)!r})\n%reset -f"))
        for cell in (cell for cell in book.cells if cell.cell_type == "code"):
            tags = cell.metadata.get("tags", ())
            if "install" not in tags:
                copies.append((cell, new_code_cell(cell.source)))
                cells.append(copies[-1][1])
            if "parameters" in tags:
                given = values.get(name, {}).items()
                cells.append(new_code_cell("\n".join(f"{parameter} = {value!r}" for parameter, value in given)))
    # Without folders to search, there is one kernel: this interpreter's own.
    kernel = AsyncKernelManager(
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), connection_file=str(folder / "kernel.json")
    )
    client = NotebookClient(new_notebook(cells=cells), km=kernel, allow_errors=True, record_timing=False, timeout=1800)
    own = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"), "HF_HUB_OFFLINE": "1"}
    # The cache tells two folders of one name and one list of files apart by nothing.
    own |= {"HF_DATASETS_CACHE": str(folder / "datasets")}
    client.execute(env=os.environ | own, cwd=str(folder), cleanup_kc=True)
    for cell, copy in copies:
        cell.outputs, cell.execution_count = copy.outputs, copy.execution_count


def errors(book: NotebookNode) -> list[str]:
    """What went wrong in a notebook that was run, first things first."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]


def shown(book: NotebookNode, cell_id: str) -> str:
    """The text that a cell printed."""
    (cell,) = (cell for cell in book.cells if cell.id == cell_id)
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def main() -> None:
    """Write the outputs anew, without progress bars and warnings."""
    books = {name: read(name) for name in OF_THE_DEMO}
    with tempfile.TemporaryDirectory() as folder:
        run(books, {}, Path(folder))
    for name, book in books.items():
        if failed := errors(book):
            raise SystemExit(f"{name}: {failed[0]}")
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(book, FOLDER / name)


if __name__ == "__main__":
    main()
