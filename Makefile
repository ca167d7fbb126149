# `make demo` and `make test` work on a fresh clone: they build .venv/ first.
PYTHON ?= python3
WORKDIR ?= runs/demo
CONFIG ?= configs/maze.py

# Big buffers on huge pages (glibc on Linux): a step of the demo's training takes
# a fifth less time, most of it page faults before. Elsewhere it does nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Most of a test's time is compilation, which keeps one core busy. A file stays on
# one process, because its tests share what they compile and train. The files
# come in the order of tests/conftest.py, long ones first: xdist would begin with
# those of many tests and end with the slowest ones, one core idle.
IN_PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# Stamp files: a second call finds them newer than setup.py and starts at once.
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help install demo demo-agent test test-all lint format bench clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## Create .venv/ and install the package into it.

# The time of this call's installation goes into the table of stage times.
demo:  ## Run the whole method on the embedded maze task (about twelve minutes).
	@start=$$(date +%s); \
	$(MAKE) --no-print-directory $(INSTALLED) && \
	OREO_INSTALL_SECONDS=$$(( $$(date +%s) - start )) \
	  $(BIN)/oreo run --config=$(CONFIG) --workdir=$(WORKDIR)

demo-agent: $(INSTALLED)  ## Play, train and play again in an embedded environment.
	$(BIN)/oreo run --config=configs/house.py --workdir=runs/house

test: $(INSTALLED_TEST)  ## Run the fast tests.
	$(BIN)/python -m pytest -q -m "not slow" $(IN_PARALLEL)

test-all: $(INSTALLED_TEST)  ## Run every test, the slow ones too.
	$(BIN)/python -m pytest -q

lint: $(INSTALLED_DEV)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_DEV)  ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Time sampling and search on this machine.
	$(BIN)/python benchmarks/speed.py

clean:  ## Remove .venv/ and caches; leave runs/ alone.
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { echo "error: oreo_jax needs Python >= 3.11, and \
	'$(PYTHON)' is not; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@echo "[1/2] creating $(VENV)/ with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian or Ubuntu: \
	apt-get install python3-venv" >&2; exit 1; }

$(INSTALLED): setup.py | $(BIN)/python
	@echo "[2/2] installing oreo_jax (a minute or two)"
	@$(PIP) install --editable .
	@touch $@

$(INSTALLED_TEST): setup.py | $(BIN)/python
	@echo "[2/2] installing oreo_jax[test] (a minute or two)"
	@$(PIP) install --editable '.[test]'
	@touch $(INSTALLED) $@

$(INSTALLED_DEV): setup.py | $(BIN)/python
	@echo "[2/2] installing oreo_jax[dev] (a minute or two)"
	@$(PIP) install --editable '.[dev]'
	@touch $(INSTALLED) $(INSTALLED_TEST) $@
