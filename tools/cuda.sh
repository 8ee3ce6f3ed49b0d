#!/bin/bash
# Compiles the library with its CUDA backends and compares registers, shared memory and spills of every kernel with
# tools/resources.json. Needs no GPU. `make cuda` calls it with the toolkit set up.
set -euo pipefail
cd "$(dirname "$0")/.."
# ptxas reports while it compiles: compile all of it (a compiler cache replays the report).
rm -rf build/cuda-release/CMakeFiles/flashdelta_cuda_*.dir
tools/build.sh cuda-release -DFLASHDELTA_CUDA=ON -DFLASHDELTA_TESTS=ON -DFLASHDELTA_BENCH=ON >build/cuda.log 2>&1 ||
  { grep -v "ptxas info" build/cuda.log | tail -60; exit 1; }
"$PY" tools/resources.py build/cuda.log "$@"
# The library must load where there is no GPU and no driver.
FLASHDELTA_LIBRARY=$PWD/build/cuda-release/libflashdelta.so "$PY" -m flashdelta info
