# Two commands matter: make demo, make test. Each makes the environment it needs.
.DEFAULT_GOAL := help
.PHONY: help install demo test parity reference trajectories trl trackers operated evaluated topology ui deploy-check mutants check chaos bench stores s3-servers clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
INSTALLED := $(VENV)/.installed
S3 := .venv-s3
TRL := .trl
TRACKERS := .trackers
DEPLOY := .deploy
UI := .ui
PIP := $(BIN)/pip --quiet --disable-pip-version-check
# uv unpacks side by side, in a sixth of pip's time, but reads none of pip's settings: pip does it where these name
# an index, and where uv fails. $(1): the environment, $(2): what to install, as it stands in its list.
packages = { ! $(BIN)/pip config list | grep -qE '\.(index-url|no-index)=' && \
	$(BIN)/uv pip install --quiet --no-deps --python $(1)/bin/python $(2); } || \
	$(PIP) --python $(1)/bin/python install --no-compile --no-deps $(2)

# An image that forbids bytecode makes every process compile torch, Megatron and SGLang anew: three times as long
export PYTHONDONTWRITEBYTECODE :=

help:                   ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

install: $(INSTALLED)   ## Create .venv with everything that runs on a CPU

$(INSTALLED): requirements.lock pyproject.toml
	@start=$$(date +%s); set -e; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rollflow needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo "Installing into $(VENV) (a minute, or what the downloads take)"; \
	$(PIP) install --no-compile --no-deps "$(TORCH)"; \
	$(PIP) install --no-deps uv==0.13.9 || true; \
	$(call packages,$(VENV),-r requirements.lock); \
	$(call packages,$(VENV),--no-build-isolation -e .); \
	echo $$(($$(date +%s) - start)) > $@

demo: $(INSTALLED)      ## Train a tiny model on arithmetic, end to end, on this machine
	@$(BIN)/rollflow demo --seconds-install $$(cat $(INSTALLED)) $(if $(SEED),--seed $(SEED)) $(if $(STORE),--store $(STORE))

test: $(INSTALLED) s3-servers  ## Run the whole test suite
	@$(BIN)/python -m tests.suite --dist loadfile --no-loadscope-reorder

stores: $(INSTALLED) s3-servers  ## Run the storage tests on all stores, the slow S3 server too (5 minutes)
	@ROLLFLOW_TEST_STORES="file memory rclone moto" $(BIN)/pytest tests/storage

parity: $(INSTALLED)    ## Compare every parallel layout with transformers, in every variant
	@ROLLFLOW_PARITY=all $(BIN)/pytest tests/engines/megatron/test_parallel.py tests/engines/megatron/test_reshard.py -s

reference: $(INSTALLED) ## Write the reference pages of all settings
	@$(BIN)/rollflow config reference

trajectories: $(INSTALLED)      ## Train 50 steps of every recipe; do rewards rise (an hour)
	@$(BIN)/python -m tests.trajectories.run

trl: $(TRL)/.installed  ## Compare losses and advantages with TRL's and transformers' own functions
	@PYTHONPATH=$(TRL) $(BIN)/pytest -W ignore tests/engines/algorithms/against_trl.py

trackers: $(TRACKERS)/.installed  ## Write to W&B and MLflow offline and read back what they have
	@PYTHONPATH=$(TRACKERS) $(BIN)/pytest -W ignore tests/tasks/trackers_offline.py

operated: $(INSTALLED)  ## Kill flow, worker and Prefect server of a run; it must go on by itself (5 minutes)
	@ROLLFLOW_OPERATED=all $(BIN)/pytest -s tests/flows/operated_live.py

evaluated: $(INSTALLED) ## Evaluate checkpoints beside a training with real engines (5 minutes)
	@$(BIN)/pytest -s tests/flows/evaluated_live.py

ui: $(UI)/.installed    ## Start, suspend, resume and cancel a run in the Prefect UI with a headless Chromium
	@PYTHONPATH=$(UI) $(BIN)/pytest -W ignore tests/flows/in_browser.py

topology: $(INSTALLED) s3-servers  ## Start the processes of deploy/compose.yaml without containers and train
	@$(BIN)/pytest -W ignore tests/flows/topology.py

deploy-check: $(DEPLOY)/.installed  ## Compare the files in deploy/ with the schemas of the tools that read them
	@PYTHONPATH=$(DEPLOY) $(BIN)/python -m tests.deploy_check

mutants: $(INSTALLED)   ## Break the algorithms in 91 ways; a test must notice each (3 minutes)
	@$(BIN)/python -m tests.engines.algorithms.mutate

$(TRL)/.installed: requirements-trl.lock $(INSTALLED)
	@$(PIP) install --no-deps --target $(TRL) -r requirements-trl.lock && touch $@

$(TRACKERS)/.installed: requirements-trackers.lock $(INSTALLED)
	@$(PIP) install --no-deps --target $(TRACKERS) -r requirements-trackers.lock && touch $@

$(DEPLOY)/.installed: requirements-deploy.lock $(INSTALLED)
	@$(PIP) install --no-deps --target $(DEPLOY) -r requirements-deploy.lock && touch $@

$(UI)/.installed: requirements-ui.lock $(INSTALLED)
	@$(PIP) install --no-deps --target $(UI) -r requirements-ui.lock && touch $@

check: $(INSTALLED)     ## Lint, format, types, layers: what CI runs before the tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

chaos: $(INSTALLED)     ## Kill processes of a training 72 times and judge each recovery (40 minutes)
	@$(BIN)/python -m tests.chaos.run

bench: $(INSTALLED) s3-servers      ## Print where an iteration's time goes
	@$(BIN)/python -m tests.object_stores $(BIN)/rollflow bench

s3-servers: $(S3)/.installed  ## Create .venv-s3 with the S3 servers that the tests run against

$(S3)/.installed: requirements-s3.lock | $(INSTALLED)
	@set -e; test -x $(S3)/bin/python || $(PYTHON) -m venv --without-pip $(S3); \
	$(call packages,$(S3),-r requirements-s3.lock); \
	touch $@

clean:                  ## Remove the environment and everything that runs wrote here
	rm -rf $(VENV) $(S3) $(TRL) $(TRACKERS) $(DEPLOY) $(UI) .rollflow
