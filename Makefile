# `make demo` and `make test` do all set-up themselves; they need Python 3.11+ with pip, and make.
PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin
# Processes that tests run in, each with one thread and some 3 GB.
WORKERS ?= 2
READY := $(ENV)/.ready

.PHONY: setup demo test test-all lint docs examples bench bench-cuda clean
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "veneer needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/veneer demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m veneer.cli.reference docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.end_to_end
	$(BIN)/python -m benchmarks.rows
	$(BIN)/python -m benchmarks.curves

bench-cuda: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "There is no CUDA device here (or torch is a build without CUDA)."; exit 1; }
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.end_to_end

clean:
	rm -rf $(ENV) build dist site .pytest_cache .mypy_cache .ruff_cache
