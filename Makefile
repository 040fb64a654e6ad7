# make pretrain and make test do all their own set-up on a machine with Python 3.11 and make (test: and a C++ compiler).
PYTHON ?= python3
BIN := .venv/bin
# Processes of make pretrain: one for each GPU, up to a power of two, which divides the batch; or two on the CPU.
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c GPU)
RANKS ?= $(or $(lastword $(foreach n,1 2 4 8 16,$(shell [ $(GPUS) -ge $(n) ] && echo $(n)))),2)
ARGS ?=
# Of make benchmark: images in a micro-batch of ViT-S. Of make gpu-step-...: whether blocks are compiled.
IMAGES ?= 32
COMPILE ?= true
GPU_PYTHON := $(if $(filter file default,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
GPU_PATH := PYTHONPATH=.:kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help setup latest lock test-versions audit pretrain benchmark test test-all lint gpu-check gpu-tests gpu-benchmarks gpu-steps
.NOTPARALLEL:  # whatever is timed has the machine to itself
help:
	@echo "make setup      create .venv and install requirements.lock (once); LATEST=1: the newest versions that resolve"
	@echo "make pretrain   train configs/tiny.yaml on $(RANKS) processes and report (ARGS='optimization.max_steps=50' ...)"
	@echo "make benchmark  time the training step at small sizes against a dense baseline (minutes)"
	@echo "make gpu-check  on a GPU, eight minutes: rates, tests, the ViT-H/14 step (PYTHON=python3: its packages, no .venv)"
	@echo "make gpu-tests  a part of it; gpu-benchmarks: all kernels at all shapes; gpu-step-vith14: beside the baseline"
	@echo "make test       the quick tests; make test-all adds the slow ones; make lint: ruff, mypy, layers"
	@echo "make test-versions  the quick tests with torch $(VERSIONS), each in .versions/ (make test-version-oldest: one)"
	@echo "make audit      look up known vulnerabilities of what requirements.lock names (it needs pypi.org or osv.dev)"
	@echo "make lock       renew requirements.lock: versions that are a month old"

PIP_INSTALL = python -m pip install -qq --disable-pip-version-check  # errors alone: it warns of what its user configured
setup: $(if $(LATEST),latest,.venv/.ready)
.venv/.ready: pyproject.toml requirements.lock
	@echo "setup 1/3: a virtual environment in .venv"
	@$(PYTHON) -m venv .venv
	@echo "setup 2/3: the packages of requirements.lock, of which torch and CUDA take 3 GB (minutes)"
	@$(BIN)/$(PIP_INSTALL) --no-deps --requirement requirements.lock
	@echo "setup 3/3: ijepa-scale, editable"
	@$(BIN)/$(PIP_INSTALL) --no-deps --editable .
	@touch $@
latest:
	@echo "setup: the newest versions that resolve, in .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/$(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable '.[dev]'
	@touch .venv/.ready

lock: setup
	$(BIN)/$(PIP_INSTALL) uv
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --no-annotate \
		--exclude-newer '30 days' --custom-compile-command "make lock" \
		pyproject.toml --output-file requirements.lock

# Whether something was found is said by pip-audit's last line; without one nothing was audited, whatever its exit code.
AUDIT = .versions/audit/bin/pip-audit --no-deps --disable-pip --strict --progress-spinner off --requirement requirements.lock
.versions/audit/bin/pip-audit:
	@$(PYTHON) -m venv .versions/audit
	@.versions/audit/bin/$(PIP_INSTALL) pip-audit
audit: .versions/audit/bin/pip-audit
	@for service in pypi osv; do \
		said=$$($(AUDIT) --vulnerability-service $$service 2>&1); code=$$?; \
		case "$$said" in *"known vulnerabilit"*) echo "$$said"; exit $$code;; esac; \
		echo "audit: $$service does not answer: $$(echo "$$said" | tail -n 1 | cut -c 1-200)"; \
	done; echo "audit: NOT AUDITED: run it where pypi.org or osv.dev can be reached"; exit 2

# Of the launcher its errors alone. It warns where it finds no GPU, but not where it is told that there is none.
ifeq ($(filter-out 0,$(GPUS)),)
pretrain: export DS_ACCELERATOR := cpu
endif
pretrain: setup
	deepspeed --quiet --num_gpus $(RANKS) launch/pretrain.py --config configs/tiny.yaml $(ARGS)

benchmark: setup
	python launch/benchmark.py --config configs/tiny.yaml --steps 40 --keep $(ARGS)
	python launch/benchmark.py --config configs/vits16.yaml optimization.micro_batch_size=$(IMAGES) --steps 14 --keep $(ARGS)
	python kernels/benchmarks/tables.py

# Two processes, each with the tests of a file: most of them wait for one core.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST) $(ARGS)

test-all: setup
	$(PYTEST) -m "slow or not slow" $(ARGS)

# Each is a folder before .venv on the path: torch, and what must fit to it. The rest, and CUDA's libraries, are .venv's.
VERSIONS := oldest 2.12 newest
PACKAGES_oldest := --no-deps 'torch==2.11.*' 'torchvision==0.26.*' 'triton==3.6.*' 'numpy==2.3.*'
PACKAGES_2.12 := --no-deps 'torch==2.12.*' 'torchvision==0.27.*' 'triton==3.7.*'
PACKAGES_newest := '.[dev]'  # all that resolves
.PRECIOUS: .versions/%/.ready
test-versions: $(VERSIONS:%=test-version-%)
.versions/%/.ready: .venv/.ready
	@echo "setup: torch $* in .versions/$*"
	@rm -rf .versions/$*
	@$(BIN)/$(PIP_INSTALL) --target .versions/$* $(PACKAGES_$*)
	@touch $@
test-version-%: .versions/%/.ready
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/.versions/$*" $(PYTEST) $(ARGS)

# These need no network and no .venv where PYTHON is given and has the packages. gpu-check: eight minutes on one GPU.
GPU_SETUP := $(if $(filter file default,$(origin PYTHON)),setup)
GPU_STEPS := vitb16 vitl16 vith14
gpu-check: $(GPU_SETUP)
	@$(GPU_PATH) $(GPU_PYTHON) launch/gpu_check.py $(ARGS); code=$$?; \
		$(GPU_PATH) $(GPU_PYTHON) kernels/benchmarks/tables.py; exit $$code
gpu-tests: $(GPU_SETUP)
	$(GPU_PATH) $(GPU_PYTHON) -m pytest -n 8 --dist loadgroup -m gpu tests/kernels tests/models tests/engine tests/objectives tests/benchmark
gpu-benchmarks: $(GPU_SETUP)
	$(GPU_PATH) $(GPU_PYTHON) -m pytest kernels/benchmarks --benchmark-only --benchmark-columns=min,median,max
	$(GPU_PATH) $(GPU_PYTHON) kernels/benchmarks/tables.py
gpu-steps: $(GPU_STEPS:%=gpu-step-%)
gpu-step-%: $(GPU_SETUP)
	$(GPU_PATH) $(GPU_PYTHON) launch/benchmark.py --config configs/$*.yaml --steps 6 --keep engine.compile=$(COMPILE) $(ARGS)
	$(GPU_PATH) $(GPU_PYTHON) kernels/benchmarks/tables.py

lint: setup
	ruff check . && ruff format --check . && mypy && PYTHONPATH=.:kernels lint-imports
