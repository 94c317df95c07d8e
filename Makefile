# make quickstart   installs into .venv, then trains, converts and evaluates the digits model
# make test-fast    installs into .venv, then runs the tests of single functions: under 3 minutes
# make test         those, and all but Slurm, installations and the slowest: under 15 minutes
# make test-all     every test: under an hour
# make check        formatting, lint and types
# make rehearse     every shipped configuration at its true size on 8, 32 and 512 ranks without a GPU,
#                   beside the planner's numbers (docs/planning.md)
# make gpu-check    on a machine with a GPU: its tests, all benchmarks, docs/performance.md; installs
#                   nothing; ARGS="--minutes 8" for a short list (docs/gpu.md); fails without
#                   Transformer Engine, unless ARGS=--without-te
# make update       constraints*.txt anew: the newest versions that pyproject.toml allows; tests
#                   exports with the releases of transformers that matter (tests/matrix)
# make test-newest, make quickstart-newest
#                   the same as test-all and quickstart in .venv-newest, which has no constraints
# make clean        removes .venv, .venv-newest and what the tools left; keeps data/ and runs/

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
NEWEST := .venv-newest/bin
LOCK := pyproject.toml constraints.txt constraints-torch.txt
# Tests run side by side (pytest-xdist), but for those that share a cluster or what they install;
# `tests/tiers.py` says which.
ALL_CORES := -n logical --maxprocesses 8 --dist worksteal
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test-fast test test-all check rehearse gpu-check update
.PHONY: newest test-newest quickstart-newest clean

quickstart: .venv/installed
	@$(BIN)/python -m dattn_mcore.quickstart $(ARGS)

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -q --tier fast $(ALL_CORES) $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest -q --tier default $(ALL_CORES) $(ARGS)

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -q --tier all --part together $(ALL_CORES) $(ARGS)
	$(BIN)/python -m pytest -q --tier all --part alone $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

rehearse: .venv/installed-dev
	$(BIN)/python -m benchmarks.rehearse_shipped $(ARGS)

# .venv where it is complete, else the Python that is there: a machine with a GPU need not have a
# network.
gpu-check:
	$(if $(wildcard .venv/installed-dev),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

update: .venv/installed-dev
	$(BIN)/python -m tools.update_constraints
	@$(MAKE) --no-print-directory .venv/installed-dev
	$(BIN)/python -m pytest -q tests/matrix

newest: .venv-newest/bin/pip
	@echo "installing the newest versions that are allowed into .venv-newest (two minutes)"
	@$(NEWEST)/python -m tools.install --newest --dev

test-newest: newest
	DATTN_TE_NEWEST=1 $(NEWEST)/python -m pytest -q --tier all --part together $(ALL_CORES) $(ARGS)
	DATTN_MATRIX_NEWEST=1 $(NEWEST)/python -m pytest -q --tier all --part alone $(ARGS)

quickstart-newest: newest
	@$(NEWEST)/python -m dattn_mcore.quickstart $(ARGS)

clean:
	rm -rf .venv .venv-newest build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

RIGHT := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
%/bin/pip:
	@found=$$($(PYTHON) --version 2>&1) || found="not a command"; \
	$(PYTHON) -c '$(RIGHT)' 2>/dev/null || { echo "error: Python 3.10, 3.11 or 3.12 is needed," \
	  "and $(PYTHON) is $$found; run make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "making $*"
	@$(PYTHON) -m venv $* >/dev/null || { rm -rf $*; echo "error: $(PYTHON) cannot make" \
	  "environments; install its venv module (on Debian: apt-get install python3-venv)" >&2; exit 1; }

.venv/installed: $(LOCK) | .venv/bin/pip
	@echo "installing PyTorch, Megatron-Core, transformers and DALI into .venv (two minutes)"
	@$(BIN)/python -m tools.install
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the tools for tests into .venv"
	@$(BIN)/python -m tools.install --dev
	@touch $@
