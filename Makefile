# `make demo` and `make test` set up everything that they need, in .venv beside this file, and set it up once: the
# second call starts at once, and a change of pyproject.toml sets it up anew.
#
#   make test TORCH="torch==2.11.0"                       another release of torch, or another build of it
#   make test TORCH= VENV_ARGS=--system-site-packages     the torch (a GPU build, say) that this Python already has
#   make test PIP_ARGS="--index-url ..."                  passed on to every `pip install`
#   make test PYTEST_ARGS="-m 'not whole'"                passed on to pytest
#   make demo DEMO_ARGS="--text my_book.txt"              passed on to `sinks compare`

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
TORCH ?= torch==2.13.0
PIP_ARGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs setup clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.run ## a real model reads a real text with and without its sinks: table, plot and JSON in out/demo
	$(BIN)/sinks compare --window 252 --sinks 4 --tokens 8192 --out out/demo $(DEMO_ARGS)

# Two processes of one thread each: the tiny models of the tests are too small for threads to help.
test: $(VENV)/.test ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.lint $(VENV)/.test ## ruff, pyright, and the floors between the rooms
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.run ## run every benchmark of a CPU; each writes benchmarks/results/NAME.json
	@mkdir -p benchmarks/results
	@set -e; for program in benchmarks/*.py; do \
		[ -e "$$program" ] || continue; \
		result=benchmarks/results/$$(basename "$$program" .py).json; \
		echo "$$program -> $$result"; \
		$(BIN)/python "$$program" --json "$$result"; \
	done

docs: $(VENV)/.run ## write docs/help.md anew from the commands
	$(BIN)/python docs/generate.py

setup: $(VENV)/.run $(VENV)/.test $(VENV)/.lint ## install all of it and stop

clean: ## remove what the targets above made: the environment, caches and output
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Three stamps, so that the demo does not wait for the tools of the tests.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sinks needs Python 3.11 or later; $(PYTHON) is older or missing: make ... PYTHON=python3.12" >&2; exit 2; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV_ARGS) $(VENV) || \
		{ rm -rf $(VENV); echo "this Python cannot create environments; on Debian: apt-get install python3-venv" >&2; exit 2; }

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "installing sinks and what it runs on (minutes the first time)"
	@$(if $(TORCH),$(INSTALL) "$(TORCH)")
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	@echo "installing what the tests need"
	@$(INSTALL) --editable ".[test]"
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.run
	@echo "installing what lint needs"
	@$(INSTALL) --editable ".[lint]"
	@touch $@
