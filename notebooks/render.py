"""Make every notebook anew from its source, with the outputs of running it here: `make notebooks`.

The sources are the scripts beside this file, in jupytext's percent format. An .ipynb is made from one, and never edited.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def sources() -> list[Path]:
    """Return the scripts that are notebooks."""
    return sorted(path for path in HERE.glob("*.py") if path != Path(__file__))


def render(source: Path) -> None:
    """Run `source` and write it, with its outputs, as an .ipynb beside it."""
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place}"
        cell["metadata"] = {}  # when it was run
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    nbformat.write(notebook, source.with_suffix(".ipynb"))


if __name__ == "__main__":
    for path in sources():
        if len(sys.argv) < 2 or path.stem in sys.argv[1:]:
            print(path.name, flush=True)
            render(path)
