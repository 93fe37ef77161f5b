"""Notebooks run from top to bottom, and are committed without outputs so that their changes can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rows import make_rows

from sim.store import write_row

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

# In a process of its own: Jupyter brings warnings, threads and an event loop that are not ours.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=60, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def execute(path, results, kept):
    """Run a notebook on stored results, as from its own folder, and return its code cells."""
    environment = {**os.environ, "FOREGATE_RESULTS": str(results), "IPYTHONDIR": str(kept.parent / "ipython")}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, path, path.parent, kept],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [cell for cell in json.loads(kept.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_budget_notebook_draws_and_tabulates_stored_results(tmp_path):
    results = tmp_path / "results"
    for row in make_rows(budgets=(0.25, 0.5), trace_kind="synthetic"):
        write_row(results, row)
    cells = execute(NOTEBOOKS / "budget.ipynb", results, tmp_path / "executed.ipynb")
    shown = [{kind for output in cell["outputs"] for kind in output.get("data", {})} for cell in cells]
    assert ["image/png" in kinds for kinds in shown] == [False, True, False, True, False]
    assert cells[0]["outputs"][0]["text"] == ["14 results of 7 systems at 2 budgets\n"]
    speeds = "".join(cells[2]["outputs"][0]["data"]["text/plain"])
    assert [line.split()[-2:] for line in speeds.splitlines() if "lru" in line] == [["14.1", "24.4"]]
    assert "SYNTHETIC ROUTING" in "".join(cells[4]["outputs"][0]["data"]["text/markdown"])
    assert sorted(path.name for path in (results / "figures").iterdir()) == ["budget.png", "ranking.png"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs_and_in_one_form(path):
    text = path.read_text()
    notebook = json.loads(text)
    assert json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n" == text
    assert {type(cell["source"]) for cell in notebook["cells"]} == {list}  # a line of source is a line of the file
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"], cell["metadata"]) for cell in code] == [([], None, {})] * len(code)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
