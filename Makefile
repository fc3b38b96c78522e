# Targets: quickstart, test, check, docs, apprentice, clean. Each creates .venv with the newest Python >= 3.11 on the PATH; set PYTHON=... to choose another.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
  command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# Exact pins for this Python. EXTRAS=cuda or EXTRAS=tpu adds the accelerator's packages.
CONSTRAINTS = constraints/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
EXTRAS ?=
# Parity tests compare with torch. PARITY=0 does not install torch (its default wheel on Linux is large); these tests are then skipped.
PARITY ?= 1
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

# pip only warns of an unknown extra, and the installation would count as done.
ifneq ($(EXTRAS),)
UNKNOWN := $(shell $(PYTHON) -c 'import tomllib; known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  wrong = [e for e in "$(EXTRAS)".split(",") if e not in known]; print(f"unknown: {wrong}. Allowed: {list(known)}" if wrong else "")')
$(if $(UNKNOWN),$(error EXTRAS=$(EXTRAS) has extras that are $(UNKNOWN), separated by commas without spaces))
endif

comma := ,
INSTALLED := $(VENV)/.installed-base$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))
DEV := $(VENV)/.installed-dev-$(PARITY)
DOCS := $(VENV)/.installed-docs

help:
	@echo "make quickstart   install, then improve programs for a bundled competition on this machine's CPU (under 10 minutes)"
	@echo "make test         the default tests;  make check   ruff, pyright, the import contract"
	@echo "make test-sandbox  only the sandbox tests; root also runs them as an ordinary user"
	@echo "make docs         build the documentation site into site/"
	@echo "make apprentice   train the small model again"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found. Install one, or give its path: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

$(DEV): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev$(if $(filter 1,$(PARITY)),$(comma)parity)]"
	@touch $@

$(DOCS): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	@touch $@

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python -m discover_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

# One worker more than cores, since many tests wait for sandboxes. The tests of a file stay together because they share expensive fixtures.
# tests/conftest.py orders the files.
test: $(DEV)
	$(BIN)/python -m pytest -m "not slow and not accelerator" -n $$(( $$(nproc) + 1 )) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(DEV)
	$(BIN)/python -m pytest -m "slow" $(ARGS)

# Only the sandbox tests. Root runs them again as an ordinary user, for whom the sandbox is set up differently.
test-sandbox: $(DEV)
	$(BIN)/python -m pytest -n auto --dist loadfile tests/execution $(ARGS)
	if [ "$$(id -u)" = 0 ]; then $(BIN)/python tests/execution/ordinary_user.py -- $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -n auto --dist loadfile tests/execution $(ARGS); fi

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# --strict: a broken link is an error.
docs: $(DOCS)
	$(BIN)/python -m mkdocs build --strict

apprentice: $(INSTALLED)
	$(BIN)/python -m discover_jax.apprentice.train --out=runs/apprentice

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache

.PHONY: help install quickstart test test-slow test-sandbox check docs apprentice clean
