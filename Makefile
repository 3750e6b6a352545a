# pellucid: `make grow` grows a small reasoning model on this machine; `make test` proves the package.
# Needs Python 3.11 or newer and make; everything else goes into .venv, from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV ?= .venv
# Further options for pip, such as an index with PyTorch's small CPU build (see CONTRIBUTING.md).
PIP_ARGS ?=
# Options for the program: make grow ARGS="--minutes 4 --seed 1"
ARGS ?=
# Test processes, one thread each.
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_ARGS)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: help grow bench test test-all lint venv clean

help:
	@echo "make grow      text to a small reasoning model, in minutes (ARGS=\"--minutes 4\")"
	@echo "make test      the tests; make test-all adds the slow ones"
	@echo "make lint      ruff and mypy"
	@echo "make bench     measured comparisons (ARGS=\"train\")"
	@echo "make venv      only build $(VENV), with everything that the tests need"

grow: $(VENV)/.installed
	@$(BIN)/pellucid grow $(ARGS)

bench: $(VENV)/.installed-dev
	@$(BIN)/pellucid bench $(ARGS)

test: $(VENV)/.installed-dev
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev
	@$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy

venv: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# What `pellucid` needs to run, and what its tests need besides. The stamps make a second call instant.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing pellucid and what it needs into $(VENV) (once; a few minutes) ..."
	@$(PIP) -e ".[fast,serve,structured,data]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt tests/references.txt | $(BIN)/python
	@echo "Installing pellucid and what its tests need into $(VENV) (once; a few minutes) ..."
	@$(PIP) -e ".[dev,parity]"
	@$(PIP) --no-deps -r tests/references.txt
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: there is no $(PYTHON) here"; \
	  echo "  next: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version), and pellucid needs Python 3.11 or newer"; \
	  echo "  next: install a newer one and name it: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) -m venv failed"; \
	  echo "  next: on Debian and Ubuntu, install the package python3-venv"; exit 1; }
