# make demo   environment, install, render shards, train, evaluate, register, show
# make test   every fast test and the short system tests
PYTHON ?= python3
# An index of torch's CPU wheels saves several GB on a machine without a GPU:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Data, runs and MLflow's store stay inside the clone.
export SLOTFORGE_HOME ?= $(CURDIR)/.slotforge

BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help env dev demo test test-all soak bench lint format clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: .venv/installed ## the virtual environment, with everything that running takes

dev: .venv/installed-dev ## the same, with what tests and lint take

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
		{ echo "slotforge needs Python 3.11 or newer; name one: make demo PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv: about 0.5 GB of downloads, and torch: 0.2 GB as a CPU wheel, about 3 GB with CUDA,"
	@echo "which is what PyPI has for Linux. Without a GPU: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	$(if $(TORCH_INDEX),$(BIN)/pip install -q --index-url $(TORCH_INDEX) torch==2.13.0)
	$(BIN)/pip install -q -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip install -q --no-deps slot-attention-pytorch==0.1.0  # an oracle; it asks for torch below 2 and needs none
	@touch $@

demo: env ## train the demo recipe, to a registered model and its picture; ARGS=--fresh trains anew
	$(BIN)/python -m orchestration.train --recipe demo $(ARGS)

test: dev ## fast tests on two cores, then the short system tests (15 minutes at most)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile \
		tests/test_layout.py tests/test_readme.py tests/slot_models tests/pipelines tests/orchestration
	$(BIN)/python -m pytest -m "not slow" tests/system

test-all: dev ## the slow tests (an hour at most)
	$(BIN)/python -m pytest -m slow tests

soak: dev ## an hour of random kills, and how much of it was training; ARGS="--minutes 10 --seed 1"
	$(BIN)/python -m benchmarks.soak $(ARGS)

bench: dev ## what is measured on a CPU, into BENCHMARKS.md (20 minutes on two quiet cores)
	for part in "attention --seconds 8" "autoencoder --repeats 5" "service --steps 30 --repeats 1" "startup --repeats 3" \
		"data --repeats 1 --format jpg" "tracking --steps 100" "checkpoint --repeats 4"; do \
		$(BIN)/python -m benchmarks.$$part --write || exit 1; done

lint: dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, and the demo's data, runs and MLflow store
	rm -rf .venv .slotforge .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
