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

.PHONY: help demo test fuzz lint build resources bench gpu wheel clean distclean

help:
	@echo 'make demo       train, prune, emit and measure a small CNN on scanned digits; writes results/digits/'
	@echo 'make test       the tests'
	@echo 'make lint       ruff and mypy'
	@echo 'make fuzz       10,000 mutated files of every kind that is read; goes on where it was stopped'
	@echo 'make build      compile what changed of the native modules'
	@echo 'make resources  registers, shared memory and spills of the CUDA and Triton kernels; writes the tables in docs/gpu.md'
	@echo 'make bench      kernels and whole models beside the peers; writes benchmarks/results/'
	@echo 'make gpu        on a machine with an NVIDIA GPU: build, checks, benchmarks; FAMILY=int8 for one family, GPU_OUT=folder'
	@echo 'make wheel      a wheel in dist/'
	@echo 'make clean      remove what was built; distclean: the environment and results too'

demo: build
	$(BIN)/kernelpress press recipes/digits.yaml --output results/digits

# The workers' threads share the cores, so they sleep where they would spin.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

FUZZERS := tests/fuzz_files.py

fuzz: build
	@for fuzzer in $(FUZZERS); do $(BIN)/python $$fuzzer || exit 1; done

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

# Nothing is installed: it needs a Python with torch, nvcc, and no network.
gpu:
	@PYTHONPATH=benchmarks $(PYTHON) -m gpu $(if $(FAMILY),--family $(FAMILY)) $(GPU_ARGS)

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel . --no-deps -w dist

clean:
	rm -rf build dist *.egg-info pyext/_cpu*.so pyext/_cuda*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) results

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("kernelpress needs Python 3.10 or newer; choose one with make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV) and compiling the kernels: some minutes the first time'
	$(PIP) setuptools pybind11 ninja
	$(PIP) --no-build-isolation -e '.[all,test,dev]'
	@touch $@

$(PEERS): $(INSTALLED)
	$(PIP) --no-build-isolation -e '.[peers]'
	@touch $@
