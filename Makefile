# Two commands matter: make demo, make test. Each makes the environment it needs.
.DEFAULT_GOAL := help
.PHONY: help install demo test check chaos bench clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
INSTALLED := $(VENV)/.installed

help:                   ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

install: $(INSTALLED)   ## Create .venv with everything that runs on a CPU

$(INSTALLED): requirements.lock pyproject.toml
	@start=$$(date +%s); set -e; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rollflow needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo "Installing into $(VENV) (about two minutes)"; \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)"; \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock; \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	echo $$(($$(date +%s) - start)) > $@

demo: $(INSTALLED)      ## Train a tiny model on arithmetic, end to end, on this machine
	@$(BIN)/rollflow demo --seconds-install $$(cat $(INSTALLED))

test: $(INSTALLED)      ## Run the whole test suite
	@$(BIN)/pytest

check: $(INSTALLED)     ## Lint, format, types, layers: what CI runs before the tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

chaos: $(INSTALLED)     ## Kill processes of a training 72 times and judge each recovery (about an hour)
	@$(BIN)/python -m tests.chaos.run

bench: $(INSTALLED)     ## Print where an iteration's time goes
	@$(BIN)/rollflow bench

clean:                  ## Remove the environment and everything that runs wrote here
	rm -rf $(VENV) .rollflow
