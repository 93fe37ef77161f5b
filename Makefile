# Two commands: `make compare` runs the main job, `make test` runs all checks (and installs a CPU torch for the recorder).
# Both set up .venv first.
.PHONY: compare test format notebooks bench clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

compare: .venv/ready
	$(BIN)/foregate compare

test: .venv/ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

format: .venv/ready-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: .venv/ready-for-tests
	$(BIN)/python notebooks/render.py

bench: .venv/ready-for-tests
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.figure
	$(BIN)/python -m benchmarks.tables

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "foregate needs Python 3.11 to 3.13; name one with make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/ready-for-tests: .venv/ready
	$(PIP) --editable '.[test,real]'
	touch $@

clean:
	rm -rf .venv results
