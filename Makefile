# Needs Python 3.11, 3.12 or 3.13, pip and make. Everything else goes into .venv, at the versions of constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SUPPORTED := 3.13 3.12 3.11
NEEDED := Trivium needs Python 3.11, 3.12 or 3.13 with pip (Debian: apt-get install python3-venv)

# Which Python: the one that PYTHON= names, else that of an environment that is there, else the newest on PATH. Each is
# run and asked, since a name says little: pyenv has names for versions that are not active, and Debian's Python comes
# without pip. The answer is its version, followed by what it lacks to make an environment.
ASK := import sys; from importlib.util import find_spec as has; \
	print("%d.%d" % sys.version_info[:2], *(["without", "pip"] if not (has("pip") or has("ensurepip")) else []), \
	*(["without", "venv"] if not has("venv") else []))
ENVIRONMENT := $(shell $(BIN)/python -c '$(ASK)' 2>/dev/null)
ifneq ($(strip $(PYTHON)),)
CHOSEN := $(PYTHON)
else ifneq ($(and $(filter 1,$(words $(ENVIRONMENT))),$(filter $(SUPPORTED),$(ENVIRONMENT))),)
CHOSEN := $(BIN)/python
else
CHOSEN := $(shell IFS=:; for version in $(SUPPORTED); do for folder in $$PATH; do \
	for name in python$$version python3; do [ -x "$$folder/$$name" ] || continue; \
	[ "$$("$$folder/$$name" -c '$(ASK)' 2>/dev/null)" != $$version ] || { echo "$$folder/$$name"; exit; }; \
	done; done; done)
endif
ANSWER := $(if $(CHOSEN),$(shell $(CHOSEN) -c '$(ASK)' 2>/dev/null))
VERSION := $(if $(filter 1,$(words $(ANSWER))),$(filter $(SUPPORTED),$(ANSWER)))
ifneq ($(strip $(PYTHON)),)
REFUSAL := PYTHON=$(PYTHON) is $(if $(ANSWER),Python $(ANSWER),no Python that runs): $(NEEDED)
else
REFUSAL := $(NEEDED), and PATH has none; name one elsewhere: make PYTHON=/path/to/python
endif
SUITABLE = [ -n "$(VERSION)" ] || { echo "$(REFUSAL)" >&2; exit 1; }

# Nothing here talks to a model hub, and a test's ranks share the cores: one thread each.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full test-python lint bench bench-data python clean

help:
	@echo "make demo       raw text to exported models in runs/demo (interrupt it, run it again)"
	@echo "make test       the tests, without those marked full"
	@echo "make test-full  all tests"
	@echo "make test-python PYTHON=python3.13   those of make test, in an environment of their own, .venv-3.13"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the benchmarks; make bench-data those of the data pipeline alone"
	@echo "make install    only the environment, .venv"
	@echo "make python     which Python is taken; PYTHON=/path/to/python names another"
	@echo "make clean      remove environments and caches; runs/ stays"

install: $(INSTALLED)

# Remade when either file changes, or the Python: one environment never mixes two. pip is asked from outside where
# Python lacks ensurepip, as Debian's may. Two installs, because deepspeed's setup imports torch: the second must see
# what the first put there.
ifneq ($(VERSION),$(or $(ENVIRONMENT),none))
.PHONY: $(INSTALLED)
endif
$(INSTALLED): pyproject.toml constraints.txt
	@$(SUITABLE)
	@echo "Installing into $(VENV) for Python $(VERSION): takes minutes, most of them for torch"
ifneq ($(VERSION),$(ENVIRONMENT))
	@if [ -e $(VENV)/pyvenv.cfg ]; then echo "  $(VENV) is of another Python, and made anew"; rm -rf $(VENV); fi
	@$(CHOSEN) -m venv --without-pip $(VENV)
endif
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || \
		$(CHOSEN) -m pip --python $(BIN)/python install -qq --constraint constraints.txt pip
	@$(BIN)/python -m pip install -qq --constraint constraints.txt pip setuptools wheel
	@echo "  1 of 2: torch"
	@$(BIN)/pip install -qq --constraint constraints.txt torch numpy
	@echo "  2 of 2: all the others, and the trivium command"
	@PYTHONWARNINGS=ignore $(BIN)/pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

python:
	@$(SUITABLE)
	@echo "Python $(VERSION): $(CHOSEN)"

demo: install
	@$(BIN)/trivium demo --with-parent

# Unit tests two at a time; then those that start ranks, runs and clusters of their own and so want both cores.
test: install
	@$(BIN)/python -m pytest -m "not full" -n 2 --dist loadfile tests/unit
	@$(BIN)/python -m pytest -m "not full" tests/parallel tests/e2e

# Any Python's, beside .venv and without touching it.
test-python:
	@$(SUITABLE)
	@[ -n "$(PYTHON)" ] || { echo "Name the Python: make test-python PYTHON=python3.13" >&2; exit 1; }
	@$(MAKE) --no-print-directory test VENV=.venv-$(VERSION)

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
	rm -rf .venv .venv-3.* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
