# `make demo` and `make test` work on a fresh machine with python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-slow lowest lint docs dist clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/accelerate launch examples/run_coco.py

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal
	$(BIN)/python -m pytest --doctest-modules hf_balancemix

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -n auto --dist worksteal

# The tests with the lowest versions that pyproject.toml declares, in an environment of its own.
lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	$(VENV)-lowest/bin/python -m pytest -m "not slow" -n auto --dist worksteal

lint: $(READY) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# -E reads every page: what was read before would not warn again.
docs: $(READY)
	$(BIN)/python -m sphinx -q -E -W --keep-going -n -b html docs docs/_build

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist docs/_build *.egg-info
