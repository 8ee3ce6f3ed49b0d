# make demo    build the library, train and run a small Gated DeltaNet language model
# make test    everything that is tested, with the time of each stage
# make lint    formatting, static analysis, types
# make bench   speed of this machine, into bench/results and the README
# make gpu     tests, sanitizers, stress and benchmarks on a machine with a Hopper GPU (tools/gpu.sh has options)
# make gpu-pack  the programs for such a machine in one file, if it has no compiler or network
# make cuda    compile the CUDA sources (no GPU needed) and compare registers and spills with tools/resources.json
#
# All of them install what they need (tools/setup.sh). PYTHON=/path/to/python uses an interpreter that has the packages of
# requirements.txt instead of build/venv. CUDA=ON or OFF overrides the choice to build for a GPU only where there is one.

ifdef PYTHON
PY := $(shell command -v $(PYTHON))
BIN := $(dir $(PY))
else
PY := $(CURDIR)/build/venv/bin/python
BIN := $(CURDIR)/build/venv/bin/
endif
export PATH := $(BIN):$(PATH)
export PY
export PYTHONPATH := $(CURDIR)/python
export FLASHDELTA_LIBRARY := $(CURDIR)/build/release/libflashdelta.so

CUDA ?= $(if $(wildcard /dev/nvidiactl),AUTO,OFF)
JOBS ?= $(shell nproc)
export CUDA JOBS

.PHONY: all demo test test-torch-floor lint format bench cuda cuda-toolkit gpu gpu-pack clean
.DEFAULT_GOAL := all

all: build/.setup-build
	@tools/build.sh release -DFLASHDELTA_TESTS=OFF -DFLASHDELTA_CUDA=$(CUDA)

demo: all
	$(PY) examples/train_lm.py $(DEMO)

test: build/.setup-test
	@tools/test.sh

# The oldest torch that is supported, in an environment of its own (2 GB; not part of `make test`).
test-torch-floor: all
	@tools/test_torch_floor.sh

lint: build/.setup-lint
	@tools/lint.sh

format: build/.setup-lint
	git ls-files '*.[ch]' '*.[ch]pp' '*.cu' '*.cuh' | xargs clang-format -i
	ruff format python tests tools bench examples

bench: build/.setup-test
	@tools/build.sh release -DFLASHDELTA_TESTS=OFF -DFLASHDELTA_BENCH=ON -DFLASHDELTA_CUDA=$(CUDA)
	@tools/bench.sh

cuda: build/.setup-test cuda-toolkit
	@tools/cuda.sh

gpu: build/.setup-test cuda-toolkit
	@PYTHON=$(PY) tools/gpu.sh

gpu-pack: build/.setup-test cuda-toolkit
	@tools/gpu_pack.sh

# The CUDA compiler from PyPI, into build/cuda, if none is installed.
cuda-toolkit: build/.setup-build
	@tools/cuda_toolkit.sh

# Set-up runs again when the requirements change.
build/.setup-%: requirements.txt tools/setup.sh
	@mkdir -p build
	@tools/setup.sh $* $(PYTHON)
	@touch $@

clean:
	find build -mindepth 1 -maxdepth 1 ! -name venv -exec rm -rf {} +
	rm -rf dist
