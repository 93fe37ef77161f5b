"""Notebooks run from top to bottom, and the .ipynb beside each source shows what it gave when it was rendered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(path for path in NOTEBOOKS.glob("*.py") if path.name != "render.py")

# All in one process that is not ours, as plain Python: what they import need be imported once.
RUN_ALL = """
import runpy
import sys

for source in sys.argv[1:]:
    print("@@@", source, flush=True)
    runpy.run_path(source, run_name="__main__")
"""


def test_every_source_runs_as_plain_python(tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "FOREGATE_TOKENS": "70", "FOREGATE_RESULTS": str(tmp_path / "results")}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *SOURCES],
        env={**environment, "IPYTHONDIR": str(tmp_path / "ipython"), "TMPDIR": str(tmp_path)},
        cwd=NOTEBOOKS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    outputs = dict(zip([path.stem for path in SOURCES], done.stdout.split("@@@ ")[1:], strict=True))
    assert "36 results of 6 systems at 6 budgets" in outputs["budget"]
    assert "it keeps them" in outputs["own_policy"]
    assert "fate+eviction=lrfu: " in outputs["quick_start"]
    assert "foretold 1 layers ahead, best 8: 0." in outputs["predictability"]
    assert "decisions differ in 0 of " in outputs["reality"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_beside_a_source_is_it_with_outputs(source):
    made, shown = jupytext.read(source), json.loads(source.with_suffix(".ipynb").read_text())
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in shown["cells"]] == [
        (cell["cell_type"], cell["source"]) for cell in made.cells
    ], "run `make notebooks`"
    code = [cell for cell in shown["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert str(NOTEBOOKS.parent) not in json.dumps(outputs)


def test_there_is_no_notebook_without_a_source():
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == [path.stem for path in SOURCES]
