# Needs Python 3.11, pip and make. Everything else goes into .venv, at the versions of constraints.txt.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Nothing here talks to a model hub, and a test's ranks share the cores: one thread each.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full lint bench bench-data clean

help:
	@echo "make demo       raw text to exported models in runs/demo (interrupt it, run it again)"
	@echo "make test       the tests, without those marked full"
	@echo "make test-full  all tests"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the benchmarks; make bench-data those of the data pipeline alone"
	@echo "make install    only the environment, .venv"
	@echo "make clean      remove .venv and caches; runs/ stays"

install: $(INSTALLED)

# Remade when either file changes. pip is asked from outside, since a Debian Python may lack ensurepip. Two
# installs, because deepspeed's setup imports torch: the second must see what the first put there.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Trivium needs Python 3.11: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV): takes minutes, most of them for torch"
	@$(PYTHON) -m venv --without-pip $(VENV)
	@$(PYTHON) -m pip --python $(BIN)/python install -qq --constraint constraints.txt pip setuptools wheel
	@echo "  1 of 2: torch"
	@$(BIN)/pip install -qq --constraint constraints.txt torch numpy
	@echo "  2 of 2: all the others, and the trivium command"
	@PYTHONWARNINGS=ignore $(BIN)/pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: install
	@$(BIN)/trivium demo --with-parent

# Unit tests two at a time; then those that start ranks, runs and clusters of their own and so want both cores.
test: install
	@$(BIN)/python -m pytest -m "not full" -n 2 --dist loadfile tests/unit
	@$(BIN)/python -m pytest -m "not full" tests/parallel tests/e2e

test-full: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	@$(BIN)/python -m pytest tests/parallel tests/e2e

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: bench-data

# Stock datatrove needs more than we do to run at all: spaCy, jieba.
bench-data: install
	@PYTHONWARNINGS=ignore $(BIN)/pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[dev,bench]'
	@$(BIN)/python -m tests.bench.data_pipeline

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
