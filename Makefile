# Every target makes its own .venv at need, and every target can fail.
# PYTHON chooses the interpreter that .venv is made from: make setup PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.stamp-core
DEV := $(VENV)/.stamp-dev
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup setup-dev demo test check bench docs docs-check clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(CORE) ## make .venv and install expunge with its core dependencies

setup-dev: $(DEV) ## setup, and what tests and checks need

demo: $(CORE) ## forget something real and write the report to out/demo
	$(BIN)/expunge demo --out out/demo

test: $(DEV) ## run the tests (ARGS="-m 'not slow'" goes to pytest, WORKERS=4)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations=10 $(ARGS)

check: $(DEV) ## lint, formatting, types, and that no generated page is stale
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/python docs/generate.py --check

bench: $(DEV) ## run every benchmark suite, the price of surgery among them (ARGS goes to bench/run.py)
	$(BIN)/python bench/run.py $(ARGS)

docs: $(CORE) ## write the generated pages again
	$(BIN)/python docs/generate.py

docs-check: $(CORE) ## fail if a generated page is stale
	$(BIN)/python docs/generate.py --check

clean: ## remove caches, builds and the demo's output; .venv and other runs in out/ stay
	rm -rf out/demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so that an install that broke off is made again. The build backend is installed
# first, from constraints.txt like everything else: pip would otherwise fetch whichever is newest.
$(CORE): pyproject.toml constraints.txt
	@python=$(BIN)/python; [ -x "$$python" ] || python="$(PYTHON)"; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "expunge needs Python 3.11 or newer, and $$python is not: give one with PYTHON=/path/to/python3.11" \
	  "(and remove an older $(VENV))." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing expunge and its core dependencies into $(VENV): about a minute, most of it PyTorch."
	$(PIP_INSTALL) hatchling editables
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

$(DEV): $(CORE) tests/requirements.txt
	@echo "Installing what tests and checks need into $(VENV)."
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]' --requirement tests/requirements.txt
	@touch $@
