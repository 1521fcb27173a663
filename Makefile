# Everything runs in .venv, which the first target that needs it creates. `make demo` and `make test` are all a newcomer needs.

# Where uv is missing it is installed into a folder of its own beside pip's cache, outside the clone.
TOOLS  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nnssl_ext
UV     := $(or $(shell command -v uv 2>/dev/null),$(TOOLS)/uv/bin/uv)
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed

# One thread per test worker; two workers. A test that hangs fails after 40 minutes and says where.
TESTS  := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 2400 --durations 80 --durations-min 4

export UV_HTTP_TIMEOUT ?= 300
export UV_PROJECT_ENVIRONMENT := .venv
export MPLBACKEND ?= Agg

.PHONY: help setup demo test test-all check format bench benchmark lock clean
.DEFAULT_GOAL := help

help:   ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)   ## create or update .venv (needed by every other target, run by itself)

# First what uv.lock says: online, online with the system's certificates (proxies that re-sign), from uv's cache alone.
# If none works (no public PyPI, but a mirror): what the index that uv is configured for offers.
SYNC   := sync --frozen --extra dev --inexact
$(STAMP): pyproject.toml uv.lock setup.py | $(UV)
	@$(UV) $(SYNC) </dev/null || UV_SYSTEM_CERTS=1 $(UV) $(SYNC) </dev/null || $(UV) $(SYNC) --offline </dev/null \
	|| { echo "uv.lock could not be installed; trying the package index that uv is configured for"; \
	     $(UV) venv --allow-existing .venv && $(UV) pip install --python $(BIN)/python -e '.[dev]' </dev/null; }
	@touch $@

$(TOOLS)/uv/bin/uv:
	@echo "uv is not installed; installing it into $(TOOLS)/uv"
	@$(PYTHON) -m venv $(TOOLS)/uv </dev/null && $(TOOLS)/uv/bin/python -m pip install --quiet --disable-pip-version-check uv </dev/null \
	|| { rm -rf $(TOOLS)/uv; $(PYTHON) -m pip install --quiet --disable-pip-version-check --target $(TOOLS)/uv uv </dev/null; }

demo: setup   ## embedded volumes -> preprocessing -> pretraining -> fine-tuning with nnU-Net, in the folder demo/
	@PATH="$$PATH:$(dir $(UV))" $(BIN)/nnssl_demo   # the demo fetches its scans with pip or uv

test: setup   ## the default tests
	@$(TESTS)

test-all: setup   ## every test that this machine can run, the slow ones too
	@$(TESTS) -m "not gpu"
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(BIN)/python -m pytest -m gpu; fi

check: setup   ## style, types, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup   ## rewrite the files in the project's style
	@$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .

bench: setup   ## all benchmarks; writes benchmarks/results.json
	@$(UV) $(SYNC) --extra bench --quiet </dev/null || true
	@$(BIN)/python -m benchmarks all

benchmark: setup   ## what pretraining is worth: the embedded suite, in the folder benchmark/ (see benchmarks/learning/suite.yaml)
	@$(BIN)/nnssl_benchmark --suite benchmarks/learning/suite.yaml -out benchmark

lock:   ## choose the versions of uv.lock anew
	@$(UV) lock --upgrade

clean:   ## remove .venv and caches
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
