# The first use of a target creates $(VENV) and installs what the target needs;
# later uses start at once.

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done)
VENV ?= .venv
PYTEST_ARGS ?=

RUN := $(VENV)/bin/python
# The tests are many and small: one process per core beats many threads in one process.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two pip runs in one environment would collide
.PHONY: help demo test test-slow test-all bench bench-full faults docs lint format clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(VENV)/.demo  ## Train the quickstart example and show its checks
	@$(RUN) examples/quickstart.py
	@$(RUN) examples/trust.py

test: $(VENV)/.dev  ## Run the fast tests
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## Run the accuracy tests (minutes)
	$(PYTEST) -m "slow and not exhaustive" $(PYTEST_ARGS)

test-all: $(VENV)/.dev  ## Run every test
	$(PYTEST) $(PYTEST_ARGS)

bench: $(VENV)/.bench  ## Measure accuracy and speed in ten minutes, into build/
	@$(RUN) -m tests.benchmarks --tier quick

bench-full: $(VENV)/.bench  ## Measure everything in hours, into docs/
	@$(RUN) -m tests.benchmarks --tier full --out docs/benchmarks.json

faults: $(VENV)/.dev  ## Plant faults in a copy, which the tests must catch
	@$(RUN) -m tests.faults

docs: $(VENV)/.dev  ## Build the documentation into build/docs
	$(RUN) -m sphinx -q -W --keep-going -b html docs build/docs

lint: $(VENV)/.dev  ## Check style, format and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy pyro_guides

format: $(VENV)/.dev  ## Rewrite the code in the house format
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:  ## Remove the environment, caches and build files
	rm -rf $(VENV) build dist .coverage* .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched only after its step succeeded, so an interrupted step is done again.
$(VENV)/.created:
	$(if $(PYTHON),,$(error Python 3.11 or later is needed: make PYTHON=/path/to/python))
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Only the files of sbibm are read: what it needs to run is not wanted.
$(VENV)/.bench: $(VENV)/.dev
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps sbibm==1.1.0
	@touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing .[$*] into $(VENV) (minutes the first time)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@
