# Needs Python 3.11, 3.12 or 3.13, pip and make. Everything else goes into .venv, at the versions of constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SUPPORTED := 3.13 3.12 3.11
NEEDED := Trivium needs Python 3.11, 3.12 or 3.13 with pip (Debian: apt-get install python3-venv)

# Which Python is used: the one that PYTHON= names, else that of an existing .venv, else the newest supported one on
# PATH. Each is run, since its name proves little: pyenv has names for versions that are not active, and Debian's Python
# comes without pip. It prints its version, then what it lacks for making an environment.
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
REFUSAL := PYTHON=$(PYTHON) is $(if $(ANSWER),Python $(ANSWER),not a Python that runs): $(NEEDED)
else
REFUSAL := $(NEEDED), and PATH has none; name one elsewhere: make PYTHON=/path/to/python
endif
SUITABLE = [ -n "$(VERSION)" ] || { echo "$(REFUSAL)" >&2; exit 1; }

# No target uses a model hub. Ranks of a test share the cores, so each has one thread.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Hundreds of processes share the modules that one of them has compiled, also where the shell says not to keep them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full test-python lint bench bench-data bench-train bench-rl python clean

help:
	@echo "make demo       raw text to exported models in runs/demo (interrupt it, run it again)"
	@echo "make test       run the tests, without those marked full; TESTS=tests/unit runs a part of them"
	@echo "make test-full  run all tests"
	@echo "make test-python PYTHON=python3.13   make test with another Python, in its own .venv-3.13"
	@echo "make lint       run ruff and mypy"
	@echo "make bench      run the benchmarks; make bench-data: those of the data pipeline, make bench-train: of training; bench-rl: of RL"
	@echo "make install    only make the environment, .venv"
	@echo "make python     print which Python is used; PYTHON=/path/to/python names another"
	@echo "make clean      remove environments and caches; runs/ stays"

install: $(INSTALLED)

# Made again when either file or the Python's version changes, so that one environment never mixes two. Where Python has
# no ensurepip (Debian), its own pip installs pip into the environment. There are two installs because deepspeed's setup
# imports torch, which must be installed before.
ifneq ($(VERSION),$(or $(ENVIRONMENT),none))
.PHONY: $(INSTALLED)
endif
$(INSTALLED): pyproject.toml constraints.txt
	@$(SUITABLE)
	@echo "Installing into $(VENV) for Python $(VERSION): this takes minutes, most of them for torch"
ifneq ($(VERSION),$(ENVIRONMENT))
	@if [ -e $(VENV)/pyvenv.cfg ]; then echo "  $(VENV) has another Python and is made again"; rm -rf $(VENV); fi
	@$(CHOSEN) -m venv --without-pip $(VENV)
endif
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || \
		$(CHOSEN) -m pip --python $(BIN)/python install -qq --constraint constraints.txt pip
	@$(BIN)/python -m pip install -qq --constraint constraints.txt pip setuptools wheel
	@echo "  1 of 2: torch"
	@$(BIN)/pip install -qq --constraint constraints.txt torch numpy
	@echo "  2 of 2: all other packages and the trivium command"
	@PYTHONWARNINGS=ignore $(BIN)/pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

python:
	@$(SUITABLE)
	@echo "Python $(VERSION): $(CHOSEN)"

demo: install
	@$(BIN)/trivium demo --with-parent

# Two files run at a time, so that a file that waits (for a cluster, for processes that end) leaves no core idle. Long
# files come first and the many short ones of tests/unit last, so that both workers end at the same time. TESTS= runs a
# part: make test TESTS=tests/unit/configs.
TESTS := tests/parallel tests/e2e tests/unit
test: install
	@$(BIN)/python -m pytest -m "not full" -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# Tests another Python in an environment of its own; .venv stays as it is.
test-python:
	@$(SUITABLE)
	@[ -n "$(PYTHON)" ] || { echo "Name the Python: make test-python PYTHON=python3.13" >&2; exit 1; }
	@$(MAKE) --no-print-directory test VENV=.venv-$(VERSION)

# Here ranks have the machine for themselves, since many runs are killed at moments that are drawn.
test-full: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	@$(BIN)/python -m pytest tests/parallel tests/e2e

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: bench-data bench-train bench-rl

# The benchmarks run unmodified datatrove, which needs packages that Trivium does not: spaCy, jieba.
bench-data: install
	@PYTHONWARNINGS=ignore $(BIN)/pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[dev,bench]'
	@$(BIN)/python -m tests.bench.data_pipeline

# Training steps beside transformers, plain PyTorch and litgpt take both cores: nothing else should run. PART=bf16 runs
# the contests in bf16, PART="dense 34M" those of that model.
bench-train: install
	@$(BIN)/python -m tests.bench.training $(if $(PART),--only "$(PART)")

# Rollouts beside transformers, what methods learn from the demo's models, and TRL. PART="sort dpo" runs some parts,
# and SEEDS=1 one seed in place of three.
bench-rl: install
	@$(BIN)/python -m tests.bench.rl $(if $(PART),--parts $(PART)) $(if $(SEEDS),--seeds $(SEEDS))

clean:
	rm -rf .venv .venv-3.* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
