# make demo   install into .venv, merge the bundled adapters, score them on the real model
# make test   install into .venv, then lint, type check and run every test
# make docs   install into .venv and build the pages into site/
# make help   every target

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One test worker per core: make test PYTEST_FLAGS=-n0 runs all in one process.
PYTEST_FLAGS ?= -n logical

# One thread per worker, and no spinning ones: a second OpenMP thread on a busy machine costs more
# than it brings. Everything the tests and the demo need is installed; nothing is fetched.
RUN_ENV := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo docs test test-fast lint format benchmark clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 14

install: $(STAMP) ## make .venv and install the tested versions into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: name another one, e.g. make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): some minutes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[test]"
	@touch $@

demo: $(STAMP) ## merge the bundled real adapters; results go to demo_output/
	$(RUN_ENV) $(BIN)/python tutorials/demo/demo.py --output demo_output

docs: $(STAMP) ## build the pages into site/, notebooks executed; warnings are errors
	$(RUN_ENV) $(BIN)/python -m sphinx -q -W --keep-going -c docs -b html . site
	@echo "Open site/index.html"

test: lint ## lint, type check and run every test
	$(RUN_ENV) $(BIN)/python -m pytest $(PYTEST_FLAGS)

test-fast: $(STAMP) ## the tests that take less than 5 seconds each
	$(RUN_ENV) $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: ## list the benchmarks and how to run one
	@for file in benchmarks/*.py; do \
	  if [ -e "$$file" ]; then echo "$(BIN)/python $$file --help"; fi; \
	done

clean: ## remove caches and results, keep .venv
	rm -rf demo_output build dist site jupyter_execute .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find manifold_merge tests tutorials -name __pycache__ -type d -prune -exec rm -rf {} +
