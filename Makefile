# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LEARN2LEARN := $(VENV)/.learn2learn
SPHINX := $(VENV)/.sphinx
DIST := $(VENV)/.dist
# One process of tests a core, of one thread each: threads of two processes on the same core wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
# Options of `make benchmark`, such as --check docs/results/benchmark.csv.
BENCHMARK ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test fast lint format docs dist benchmark clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(LEARN2LEARN)  ## Make the environment in .venv

$(STAMP): setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' 'numpy<2'
	touch $(STAMP)

# learn2learn is compiled from source: only the tests need it.
$(LEARN2LEARN): $(STAMP) requirements/learn2learn.txt
	$(BIN)/python -m pip install --quiet --use-pep517 -r requirements/learn2learn.txt
	touch $(LEARN2LEARN)

$(SPHINX): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $(SPHINX)

$(DIST): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[dist]'
	touch $(DIST)

demo: $(STAMP)  ## Meta-train on the embedded letters, test on unseen ones, show the result
	$(BIN)/python examples/quickstart.py

test: $(LEARN2LEARN)  ## Lint, types and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --cov --cov-report=term --cov-fail-under=95

fast: $(LEARN2LEARN)  ## The tests that are not slow
	$(PYTEST) -m "not slow"

lint: $(STAMP)  ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(SPHINX)  ## Build the documentation site in docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

dist: $(DIST)  ## Build wheel and sdist in dist/, and check both in a fresh environment
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py

benchmark: $(LEARN2LEARN)  ## Compare with other code on random images of Omniglot's size
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	$(BIN)/python -m benchmarks --workloads omniglot-5-1 omniglot-20-1 $(BENCHMARK)

clean:  ## Remove the environment and caches
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
