# `make quickstart` and `make test` work on a fresh machine: each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests and the quickstart run without a hub.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test attack test-quick test-kernels test-vllm test-ray test-matrix lint docs mutants benchmarks hooks install clean

quickstart: install
	$(BIN)/ia3 quickstart

test: lint docs test-kernels
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=95

# The core's files of tests that take least, in at most 90 seconds on one core: for while you write.
test-quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q @tests/quick.txt

# The Triton kernels in its interpreter, on a CPU. It must be told before Triton is imported, so this is a run of its own.
KERNELS := tests/fast/ops tests/fast/test_block_by_kernels.py tests/fast/test_slots.py::test_by_kernels
test-kernels: install
ifeq ($(shell uname -sm),Linux x86_64)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(KERNELS)
else
	@echo "Triton has no wheel for this machine, so its kernels are not tested here."
endif

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

# Not part of `test`: Ray, a third of a gigabyte, beside what .venv has; a cluster of two workers on this machine.
RAY := build/ray
test-ray: install $(RAY)/.installed
	PYTHONPATH=$(CURDIR)/$(RAY):$(CURDIR)/src:$(CURDIR)/tests RAY_AUTH_MODE=disabled OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q tests/cluster/on_cluster.py tests/serving/test_on_ray.py

$(RAY)/.installed: tests/cluster/requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(RAY) -r tests/cluster/requirements.lock
	touch $@

# Not part of `test`: the oldest and newest torch, transformers and Python that are promised, each in an environment of its
# own under build/ (gigabytes); `make test-matrix MATRIX=--torch-here` changes transformers alone.
test-matrix: install
	$(BIN)/python tests/smoke/matrix.py $(MATRIX)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

mutants: install
	$(BIN)/python tests/mutants/run.py

# Not part of `test`, which runs a sample: every hostile input at every door (an hour or more on one core); trainings,
# sweeps and predictions killed at their file events, full disks, flipped bits; and what schemathesis makes of the
# server's description.
FUZZ := build/schemathesis
attack: install $(FUZZ)/.installed
	$(BIN)/python tests/attack/harness.py $(ATTACK)
	PYTHONPATH=$(CURDIR)/$(FUZZ):$(CURDIR)/src:$(CURDIR)/tests $(BIN)/python tests/attack/openapi.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/recovery.py train
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/recovery.py train --full-disk --few 30
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/recovery.py sweep --few 60
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/recovery.py flips
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/predictions.py

$(FUZZ)/.installed: tests/attack/requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(FUZZ) -r tests/attack/requirements.lock
	touch $@

benchmarks:
	@$(PYTHON) benchmarks/catalogue.py

hooks: install
	$(BIN)/pre-commit install

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .coverage
