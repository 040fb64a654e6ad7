# make pretrain and make test do all their own set-up on a machine with Python 3.11 and make (test: and a C++ compiler).
PYTHON ?= python3
BIN := .venv/bin
# Processes of make pretrain: one for each GPU, or two on the CPU.
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c GPU)
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
ARGS ?=
GPU_PYTHON := $(if $(filter file default,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
GPU_PATH := PYTHONPATH=.:kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help setup pretrain benchmark test test-all lint gpu-check gpu-tests gpu-benchmarks gpu-steps
.NOTPARALLEL:  # whatever is timed has the machine to itself
help:
	@echo "make setup      create .venv and install (once)"
	@echo "make pretrain   train configs/tiny.yaml on $(RANKS) processes and report (ARGS='optimization.max_steps=50' ...)"
	@echo "make benchmark  time the training step at small sizes against a dense baseline (minutes)"
	@echo "make gpu-check  on a GPU: tests, benchmarks of kernels and of steps (PYTHON=python3: with its packages, no .venv)"
	@echo "make test       the quick tests; make test-all adds the slow ones; make lint: ruff, mypy, layers"

setup: .venv/.ready
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

pretrain: setup
	deepspeed --num_gpus $(RANKS) launch/pretrain.py --config configs/tiny.yaml $(ARGS)

benchmark: setup
	python launch/benchmark.py --config configs/tiny.yaml --steps 40 --keep $(ARGS)
	python launch/benchmark.py --config configs/vits16.yaml optimization.micro_batch_size=32 --steps 14 --keep $(ARGS)
	python kernels/benchmarks/tables.py

test: setup
	pytest $(ARGS)

test-all: setup
	pytest -m "slow or not slow" $(ARGS)

# Needs no network and no .venv where PYTHON is given and has the packages. All parts run: make -k.
GPU_SETUP := $(if $(filter file default,$(origin PYTHON)),setup)
GPU_STEPS := vitb16 vitl16 vith14
gpu-check:
	$(MAKE) -k gpu-tests gpu-benchmarks gpu-steps
gpu-tests: $(GPU_SETUP)
	$(GPU_PATH) $(GPU_PYTHON) -m pytest -m gpu tests/kernels tests/models tests/engine tests/test_benchmark.py
gpu-benchmarks: $(GPU_SETUP)
	$(GPU_PATH) $(GPU_PYTHON) -m pytest kernels/benchmarks --benchmark-only --benchmark-columns=min,median,max
	$(GPU_PATH) $(GPU_PYTHON) kernels/benchmarks/tables.py
gpu-steps: $(GPU_STEPS:%=gpu-step-%)
gpu-step-%: $(GPU_SETUP)
	$(GPU_PATH) $(GPU_PYTHON) launch/benchmark.py --config configs/$*.yaml --steps 6 --keep engine.compile=true $(ARGS)
	$(GPU_PATH) $(GPU_PYTHON) kernels/benchmarks/tables.py

lint: setup
	ruff check . && ruff format --check . && mypy && PYTHONPATH=.:kernels lint-imports
