# Everything runs in an environment of its own, .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

# Two architectures, where there is an nvcc, tell all that tests look at; a wheel has code for every one.
build $(VENV)/.installed: export KERNELPRESS_CUDA_ARCHS ?= 80;90

INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers

# Of test-torch: each version has an environment of its own.
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED)
TORCH_VENV := .venv-torch-$(TORCH)
TORCH_INSTALLED := $(TORCH_VENV)/.installed

# Of zoo: beside .venv, where transformers would find a torchvision whose operations do not load.
ZOO := build/zoo/.installed

.PHONY: help demo methods test test-torch test-torch-all lint build resources bench gpu fuzz zoo wheel clean distclean

help:
	@echo 'make demo       train, prune, quantize, emit and measure a small CNN on scanned digits; writes results/digits/'
	@echo 'make methods    every method of compression on two networks; goes on where it was stopped; writes the table of README.md'
	@echo 'make test       the tests'
	@echo 'make test-torch TORCH=2.11.0   the tests that need no GPU, under that torch; test-torch-all: under each that is promised'
	@echo 'make lint       ruff and mypy'
	@echo 'make build      compile what changed of the native modules'
	@echo 'make resources  registers, shared memory and spills of the CUDA and Triton kernels; writes the tables in docs/gpu.md'
	@echo 'make bench      kernels and whole models beside the peers; writes benchmarks/results/'
	@echo 'make gpu        on a machine with an NVIDIA GPU: build, checks, benchmarks; FAMILY=int8 for one family, GPU_OUT=folder'
	@echo 'make fuzz       2,000 random models, 10,000 mutated files of every kind, each right or refused; goes on where it was stopped'
	@echo 'make zoo        a model of every family of timm and torchvision, emitted and compared with float64; writes docs/zoo.md'
	@echo 'make wheel      a wheel in dist/'
	@echo 'make clean      remove what was built; distclean: the environment and results too'

demo: build
	$(BIN)/kernelpress press recipes/digits.yaml --output results/digits

methods: build
	$(BIN)/python benchmarks/methods.py

# The workers' threads share the cores, so they sleep where they would spin.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

# What was built, under another torch. A GPU is hidden: its tests belong to the torch of that machine.
test-torch: build $(TORCH_INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=passive $(TORCH_VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-torch-all:
	.ci/torch-matrix

# mypy knows a package by its folder's name: links give the folders their import names.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/kernelpress
	@ln -s $(CURDIR)/pyext/* $(CURDIR)/kernels build/typing/kernelpress/
	$(BIN)/mypy

build: $(INSTALLED)
	@$(BIN)/python setup.py -q build_ext --inplace

resources: build
	$(BIN)/python benchmarks/resources.py
	$(BIN)/python benchmarks/triton_resources.py

bench: build $(PEERS)
	$(BIN)/python -m pytest $(filter-out %_models.py,$(wildcard benchmarks/bench_*.py)) --record
	$(BIN)/python benchmarks/bench_models.py
	$(BIN)/python benchmarks/bench_models.py --dtype int8

# Nothing is installed: it needs a Python with torch, nvcc, and no network.
gpu:
	@PYTHONPATH=benchmarks $(PYTHON) -m gpu $(if $(FAMILY),--family $(FAMILY)) $(GPU_ARGS)

# One script after the other, whatever the first finds.
fuzz: build
	@status=0; for script in $(sort $(wildcard tests/fuzz_*.py)); do \
		echo "== $$script"; TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python $$script || status=1; done; exit $$status

zoo: build $(ZOO)
	TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python tests/zoo.py

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel . --no-deps -w dist

clean:
	rm -rf build dist *.egg-info pyext/_cpu*.so pyext/_cuda*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-torch-* results

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("kernelpress needs Python 3.10 or newer; choose one with make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV) and compiling the kernels: some minutes the first time'
	$(PIP) setuptools pybind11 ninja
	$(PIP) --no-build-isolation -e '.[all,test,dev]'
	@touch $@

# The package is not built again: its editable installation is copied, its requirements are those that this one states.
# Another torch asks for Triton and setuptools of its own.
$(TORCH_INSTALLED): $(INSTALLED)
	@echo 'Installing torch $(TORCH) into $(TORCH_VENV): some gigabytes'
	$(BIN)/python -m venv --clear $(TORCH_VENV)
	cp -r $(VENV)/lib/python3*/site-packages/*kernelpress* $(TORCH_VENV)/lib/python3*/site-packages/
	grep -vE '^(torch$(if $(filter-out $(PINNED),$(TORCH)),|triton|setuptools))==' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip --disable-pip-version-check install -q -c $(TORCH_VENV)/constraints.txt \
		torch==$(TORCH) 'setuptools>=77' pybind11 ninja 'kernelpress[all,test]'
	@touch $@

$(ZOO): constraints.txt | $(INSTALLED)
	rm -rf build/zoo
	$(PIP) --no-deps --target build/zoo timm torchvision torch-pruning
	@touch $@

# ExecuTorch asks for tools of other platforms, which its CPU runtime never imports.
$(PEERS): $(INSTALLED)
	$(PIP) --no-build-isolation -e '.[peers]'
	$(PIP) --no-deps executorch pytorch-tokenizers 'deepsparse; python_version < "3.12"'
	@touch $@
