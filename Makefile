# make quickstart   installs into .venv, then trains, converts and evaluates the digits model
# make test         installs into .venv, then runs all tests
# make check        formatting, lint and types
# make gpu-check    on a machine with a GPU: its tests, all benchmarks, docs/performance.md;
#                   fails without Transformer Engine, unless ARGS=--without-te
# make clean        removes .venv and what the tools left; keeps data/ and runs/

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check gpu-check clean

quickstart: .venv/installed
	@$(BIN)/python -m dattn_mcore.quickstart $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest -q $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu-check: .venv/installed-dev
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without its dependencies: some clash with ours (protobuf), and most serve other models.
LMMS_EVAL := 0.7.3

# PyTorch goes first and alone: on a machine where one build of it was chosen, that build stays.
.venv/torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 13) else "error: Python 3.10, 3.11 or 3.12 is needed, $(PYTHON) is " + sys.version.split()[0] + "; run make PYTHON=python3.11 ...")'
	@test -x $(BIN)/pip || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing PyTorch into .venv (about a minute)"
	@$(PIP) "torch>=2.11,<2.14"
	@touch $@

.venv/installed: .venv/torch
	@echo "installing Megatron-Core, transformers and DALI into .venv (about a minute)"
	@$(PIP) --editable ".[dali]"
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the tools for tests into .venv"
	@$(PIP) --editable ".[dali,dev]"
	@$(PIP) --no-deps "lmms-eval==$(LMMS_EVAL)"
	@touch $@
