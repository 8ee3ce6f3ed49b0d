#!/bin/bash
# Formatting, static analysis and types; `make lint` calls it with the environment set up.
set -uo pipefail
cd "$(dirname "$0")/.."
. tools/stages.sh

format() { git ls-files '*.[ch]' '*.[ch]pp' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror; }
# Only what is not a vector kernel: those are templates over Highway's headers, which take minutes to analyse.
tidy() {
  cmake -S . -B build/tidy -G Ninja --log-level=WARNING -DFLASHDELTA_CUDA=OFF -DFLASHDELTA_TESTS=OFF -DFLASHDELTA_EXAMPLES=ON \
    -DCMAKE_CXX_COMPILER_LAUNCHER= -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >build/tidy.configure.log || { cat build/tidy.configure.log; return 1; }
  git ls-files 'src/*.cpp' 'src/cpu/*.cpp' 'examples/*.cpp' | grep -v vector_kernels.cpp |
    xargs -P "${JOBS:-$(nproc)}" -n 1 clang-tidy -p build/tidy --quiet --extra-arg=-Wno-unknown-warning-option
}
python() { ruff check python tests tools bench examples && ruff format --check python tests tools bench examples; }
types() { mypy; }

stage "clang-format" format
stage "clang-tidy" tidy
stage "ruff" python
stage "mypy --strict" types
stages_end
