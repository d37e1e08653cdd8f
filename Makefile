# Everything starts from here on a fresh machine; `make` alone prints the targets.

VENV := .venv
PYTHON := $(VENV)/bin/python
EXTRAS := cpu,hf,report,dev,demo
NATIVE_SOURCES := $(shell find plugins -name '*.cc' -o -name '*.h' -o -name 'CMakeLists.txt')

# PyTorch's caching allocator would hide the ends of tensors.
SANITIZED := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all

# mypy resolves `longspan.*` by folders; the import package is mapped from three folders when it is installed.
TYPES := build/types

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types sanitize bench gpu gpu-sanitize compute-sanitizer trt clean

help: ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.ready ## Make .venv with everything for development

$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE_SOURCES)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet --constraint constraints.txt scikit-build-core cmake ninja
ifeq ($(shell uname -sm),Linux x86_64)
	# TensorRT's headers, for the plugin; and TensorRT-RTX, whose archive has to be built in isolation.
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-deps kernel-lens
	$(PYTHON) -m pip install --quiet --constraint constraints.txt tensorrt-rtx
endif
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@

demo: setup ## Extend, trace, check and time a real sentence encoder
	$(PYTHON) samples/long_minilm/run.py

# One process a core, each with one thread: torch's and ONNX Runtime's own threads would fight over the cores.
test: setup ## Run every test
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadscope

lint: setup ## Lint and check the format of Python and C++
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find plugins tests -name '*.cc' -o -name '*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror

types: setup ## Check types
	mkdir -p $(TYPES)/longspan
	ln -sfn ../../../exporter ../../../plugins ../../../cli $(TYPES)/longspan/
	MYPYPATH=$(TYPES) $(VENV)/bin/mypy --namespace-packages --explicit-package-bases \
	  -p longspan.exporter -p longspan.plugins -p longspan.cli

sanitize: setup ## Run the kernels on random problems under the address and undefined-behaviour sanitizers
	$(VENV)/bin/cmake -G Ninja -S plugins -B build/sanitize -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(PYTHON)) -DLONGSPAN_LIBRARY=OFF -DLONGSPAN_TESTS=ON -DLONGSPAN_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build build/sanitize
	$(VENV)/bin/ctest --test-dir build/sanitize --output-on-failure

bench: setup ## Time the CPU kernels against their peers
	$(PYTHON) benchmarks/cpu_attention.py

gpu: setup ## Where there is a GPU: run its tests, then time its kernels
	$(PYTHON) -m pytest tests/gpu --require-gpu
	$(PYTHON) benchmarks/gpu_attention.py

compute-sanitizer:
	@command -v $@ > /dev/null || \
	  { echo "$@ is not on the PATH; next step: install the CUDA toolkit, which it is part of" >&2; exit 4; }

# Each launch costs seconds under the sanitizer: out-of-bounds accesses in every case of one type, races in a few.
gpu-sanitize: compute-sanitizer setup ## Where there is a GPU: run its tests under compute-sanitizer
	$(SANITIZED) --tool memcheck $(PYTHON) -m pytest tests/gpu/test_kernels.py --require-gpu -x -k 'reference and float32'
	$(SANITIZED) --tool racecheck $(PYTHON) -m pytest tests/gpu/test_kernels.py --require-gpu -x -k 'same_bits'

trt: setup ## Where there are TensorRT and a GPU: build, run and compare engines
	$(PYTHON) -m pytest tests/trt --require-trt

clean: ## Remove builds and caches, keep .venv
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
