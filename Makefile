# make help lists the targets. `make test` and `make demo` do their own set-up on a fresh machine.

PYTHON ?= python3
VENV   ?= .venv
# The version that the tests are run against; override for another build: make test TORCH="torch==2.6.0"
TORCH  ?= torch==2.13.0
# Test processes. Each one computes on a single thread, so that two of them share two cores.
JOBS   ?= 2
# A folder with real data for the demo; without it the demo uses the synthetic phantom.
DATA   ?=
# Where the demo leaves its table and pictures.
OUT    ?= runs/demo
# Where results-smoke leaves its results and its page.
SMOKE  ?= runs/results-smoke

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo results-smoke test nightly lint types docs format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first and pinned, so that no later step picks another build. pip 25.1 is the first with --group.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=25.1"
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[all]" --group dev "$(TORCH)"
	touch $@

setup: $(STAMP) ## create .venv with the package, its extras and the tools

demo: $(STAMP) ## train with and without PASSION, leave a table and pictures (DATA=folder for real data)
	$(PY) -m examples.demo --out $(OUT) $(if $(DATA),--data $(DATA)) $(ARGS)

results-smoke: $(STAMP) ## the whole chain of an experiment on tiny phantoms: train, evaluate, tables, pictures, page
	rm -rf $(SMOKE)
	$(PY) -m examples.experiment --data phantom-tiny --strategies plain passion --steps 4 --patch 16 --threads 1 \
	  --results $(SMOKE)/phantom $(ARGS)
	$(PY) -m examples.experiment report --results $(SMOKE)/phantom --data phantom-tiny --out $(SMOKE)

test: $(STAMP) ## tests, doctests and the code blocks of the documentation
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

nightly: $(STAMP) ## what takes longer than CI may: 2,000 generated networks, batches and mistakes for each fuzz test
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -n $(JOBS) tests/test_fuzz.py $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting; import-linter: the layers of docs/architecture.md
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(STAMP) ## mypy
	$(PY) -m mypy

docs: $(STAMP) ## build the documentation site in build/site; every warning is an error
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet -b html -d build/doctrees docs build/site $(ARGS)

format: $(STAMP) ## put imports and layout right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and everything the tools left
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
