# Everything that CI runs, a person can run. Each goal sets up first; a second call sets up nothing again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup browser demo test test-slow soak lint types docs bench clean
help:
	@echo "make demo       set up, train the demo model (about two minutes), print generated text"
	@echo "make test       set up, run the tests          make test-slow   the long ones"
	@echo "make soak HOURS=6  runs under every fault at once"
	@echo "make lint types  ruff; mypy --strict           make docs        regenerate docs/cli.md, docs/reproduction.md"
	@echo "make browser    install Chromium, for the tests of pages (Debian and Ubuntu, as root)"
	@echo "make bench NANOGPT=clone TEXT=tinyshakespeare.txt   a table against nanoGPT"
	@echo "make clean       remove what setup and tests made"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "regpt needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 " + "setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (once; PyTorch is large, allow a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Tests of pages need a Chromium. Where root can install one (CI, containers) the tests do; elsewhere they skip and say so.
HAS_BROWSER = command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null

browser:
	@$(HAS_BROWSER) || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

demo: setup
	@$(BIN)/regpt train demo

test: setup
	@$(HAS_BROWSER) || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && $(MAKE) -s browser; } || echo "no Chromium: tests of pages will skip (make browser installs one)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

soak: setup
	@OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py --hours $(or $(HOURS),6)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

docs: setup
	@$(BIN)/python -m regpt.cli.reference > docs/cli.md
	@$(BIN)/python -m regpt.cli.reproduction > docs/reproduction.md

bench: setup
	@$(BIN)/python benchmarks/shakespeare_cpu.py --nanogpt "$(NANOGPT)" --text "$(TEXT)"

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
