#!/bin/bash
# Every test, in stages; prints the time of each and fails if one did. `make test` calls it with the environment set up.
set -uo pipefail
cd "$(dirname "$0")/.."
. tools/stages.sh

release() {
  tools/build.sh release -DFLASHDELTA_TESTS=ON -DFLASHDELTA_EXAMPLES=ON -DFLASHDELTA_CUDA="${CUDA:-OFF}" &&
    ctest --test-dir build/release --output-on-failure
}
sanitizers() {
  tools/build.sh sanitize -DFLASHDELTA_TESTS=ON -DFLASHDELTA_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" -DFLASHDELTA_CUDA=OFF &&
    ctest --test-dir build/sanitize --output-on-failure
}
packaging() { "$PY" -m pytest -q --durations=5 tests/packaging; }
python() { "$PY" -m pytest -q --durations=5 tests/python; }

stage "C++ tests, Release" release
stage "C++ tests, address and undefined-behaviour sanitizers" sanitizers
stage "C header, examples, installed library, wheel, README" packaging
stage "Python tests" python
stages_end
