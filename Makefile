# Everything runs in .venv, which `make` builds from pyproject.toml and constraints.txt.
# Needed beforehand: Python 3.10 or newer (PYTHON=... chooses one) and make.

PYTHON  ?= python3
WORKERS ?= 2
RANKS   ?= 2
ARGS    ?=

VENV := .venv
BIN  := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help train test test-slow test-all rules lint format check clean

help:
	@echo "make train      train the example model on $(RANKS) ranks (ARGS='--help' lists its options)"
	@echo "make test       the fast tests"
	@echo "make test-all   every test"
	@echo "make check      format, lint, types, then the fast tests"
	@echo "make format     let ruff rewrite the files"
	@echo "make clean      remove the virtual environment and the caches"

# The check says what is wrong with ARGS in one line, without torchrun's report around it.
train: $(VENV)/installed-train
	@$(BIN)/python launch/train.py --check $(ARGS)
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) launch/train.py $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

# One test at a time, since some of these measure time and memory; mutants measure nothing.
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow --ignore tests/repo/test_mutants.py
	$(BIN)/python -m pytest -m slow -n $(WORKERS) tests/repo/test_mutants.py

test-all: test
	$(MAKE) test-slow

# The repository's own rules; part of `make test` too.
rules: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not slow" tests/repo

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint
	$(MAKE) test

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A stamp for each extra: installed again only when the pins or the project change.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

# Some systems ship Python without the part that puts pip into an environment:
# then the system's own pip does it.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "shardopt needs Python 3.10 or newer, got: $$($(PYTHON) --version 2>&1)." \
	         "Name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv $(VENV) || { \
	    $(PYTHON) -m venv --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } || { \
	    echo "$(PYTHON) can make no virtual environment with pip: install its venv package" \
	         "(python3-venv on Debian), or name another: make PYTHON=/path/to/python3" >&2; exit 1; }
