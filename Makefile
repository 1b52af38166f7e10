# `make quickstart` and `make test` work on a fresh machine: each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests and the quickstart run without a hub.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-vllm lint docs mutants install clean

quickstart: install
	$(BIN)/ia3 quickstart

test: lint docs
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=95

# Not part of `test`: an environment of its own, 3.5 GB, for tests that start vLLM on the CPU.
VLLM := .venv-vllm
test-vllm: $(VLLM)/.installed
	cd plugins/vllm && OMP_NUM_THREADS=1 ../../$(VLLM)/bin/python -m pytest -c pyproject.toml

$(VLLM)/.installed: plugins/vllm/requirements.lock plugins/vllm/pyproject.toml pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade "pip>=25"
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r plugins/vllm/requirements.lock
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable . --editable plugins/vllm
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

mutants: install
	$(BIN)/python tests/mutants/run.py

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .coverage
