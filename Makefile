# Everything that CI runs, a person can run. Each goal sets up first; a second call sets up nothing again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup demo test test-slow lint types docs bench clean
help:
	@echo "make demo       set up, train the demo model (about two minutes), print generated text"
	@echo "make test       set up, run the tests          make test-slow   the long ones"
	@echo "make lint types  ruff; mypy --strict           make docs        regenerate docs/cli.md"
	@echo "make bench      tables against named peers     make clean       remove what setup and tests made"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "regpt needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 " + "setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (once; PyTorch is large, allow a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	@$(BIN)/regpt train demo

test: setup
	@$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: setup
	@$(BIN)/python -m pytest -m slow

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

docs: setup
	@$(BIN)/python -m regpt.cli.reference > docs/cli.md

bench: setup
	@$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
