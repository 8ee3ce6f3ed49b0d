#!/bin/bash
# The Python tests with the oldest torch that is supported, in build/venv-torch-floor. `make test-torch-floor` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
floor=build/venv-torch-floor
if [ ! -x $floor/bin/pytest ]; then
  python3 -m venv $floor
  $floor/bin/python -m pip install --disable-pip-version-check --quiet torch==2.6.0 $(grep -E '^(numpy|pytest|hypothesis|tqdm|matplotlib)' requirements.txt)
fi
# transformers and FLA need newer versions of torch than this one.
$floor/bin/python -m pytest -q tests/python --ignore-glob='*test_transformers*' --ignore-glob='*test_fla*'
