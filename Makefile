# Every target is complete on a fresh machine: it makes .venv where there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench docs docs-serve clean

demo: $(VENV)/.base          ## install, compare four adapters on the embedded model, write demo/report.html
	$(BIN)/weft demo --output demo

test: $(VENV)/.test          ## install, run all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.lint          ## style, types, floors, generated files
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m weft._stubs --check

bench: $(VENV)/.test         ## speed side by side with PEFT, as ratios; results in benchmarks/results
	$(BIN)/python benchmarks/adapters.py

docs: $(VENV)/.docs          ## generate the method pages and build the site strictly into site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs serve

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with it in place nothing else asks for a build with CUDA packages
$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e ".[test,vision]"
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) -e ".[lint]"
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) site demo .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
