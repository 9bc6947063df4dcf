# Everything happens in .venv, made from pyproject.toml under constraints.txt. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
# Naming it on the command line (make PYTHON=/opt/python3.12/bin/python3) skips the search.
PYTHON ?=
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help venv venv-dev quickstart test lint format proofs schema clean

help:  ## Show what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A version manager may put a python3.11 on PATH that only prints an error, so each candidate is run.
$(BIN)/python:
	@for candidate in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    "$$candidate" -m venv .venv; exit 0; \
	  fi; \
	done; \
	found="$$($(or $(PYTHON),python3) --version 2>/dev/null || echo "no $(or $(PYTHON),python3)")"; \
	echo "make: Python 3.11 or newer with its venv module is needed, found: $$found." \
	  "Install it (Debian: apt-get install python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

# The stamps are older than what they were made from as soon as that changes.
.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch .venv/.installed $@

venv: .venv/.installed  ## Make .venv with what training needs

venv-dev: .venv/.installed-dev  ## Make .venv with what development needs too

quickstart: .venv/.installed  ## Install, then go from drawn clips to sampled videos in minutes, on a CPU
	$(BIN)/wan-dist quickstart --restart

test: lint  ## Check style, types and layers, then run the tests
	$(BIN)/python -m pytest

proofs: .venv/.installed-dev  ## Run the long proofs (memorisation, kills, faults and the like)
	$(BIN)/python -m pytest -m proof --timeout 2700

lint: .venv/.installed-dev  ## Check style, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/.installed-dev  ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: .venv/.installed  ## Write the JSON Schema that editors use for configs/train/*.yaml
	$(BIN)/wan-dist config schema > configs/train.schema.json

clean:  ## Remove .venv, builds and caches; runs stay
	rm -rf .venv build dist .cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
