#!/bin/bash
# Brings a bare Debian machine to where `make` can work: system packages, then the Python environment of requirements.txt.
#
# Usage: tools/setup.sh [build|test|lint] [PYTHON]
#   build  what compiling needs; test: also the C++ test and benchmark libraries; lint: also clang-format and clang-tidy
#   PYTHON an interpreter that has the packages already (then nothing is installed into it, and no network is needed)
set -euo pipefail
cd "$(dirname "$0")/.."
level=${1:-build}
python=${2:-}

has_header() { echo "#include <$1>" | g++ -E -x c++ - >/dev/null 2>&1; }
missing=()
need() { local package=$1; shift; "$@" >/dev/null 2>&1 || missing+=("$package"); }

need g++ command -v g++
need make command -v make
need libhwy-dev has_header hwy/highway.h
if [ -z "$python" ]; then
  need python3-venv python3 -c 'import ensurepip, venv'
  # torch.compile builds Python extensions.
  need python3-dev python3 -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
fi
if [ "$level" != build ]; then
  need libgtest-dev has_header gtest/gtest.h
  need libbenchmark-dev has_header benchmark/benchmark.h
fi
if [ "$level" = lint ]; then
  need clang-format command -v clang-format
  need clang-tidy command -v clang-tidy
  need libomp-dev compgen -G '/usr/lib/llvm-*/lib/clang/*/include/omp.h'  # clang's own, for clang-tidy
fi
if [ ${#missing[@]} -gt 0 ]; then
  line="apt-get install -y --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup: these packages are missing; on Debian:  sudo $line" >&2
    exit 1
  fi
  echo "setup: apt-get update; $line"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  $line -qq >build/apt.log 2>&1 || { tail -20 build/apt.log >&2; exit 1; }
fi

if [ -n "$python" ]; then
  "$python" tools/check_requirements.py
elif ! build/venv/bin/python tools/check_requirements.py >/dev/null 2>&1; then
  torch=$(sed -n 's/^torch==//p' requirements.txt)
  site=()
  if python3 -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    echo "setup: using the torch $torch that is installed"
    site=(--system-site-packages)
  fi
  echo "setup: build/venv from requirements.txt (torch from PyPI takes some minutes)"
  python3 -m venv "${site[@]}" build/venv
  build/venv/bin/python -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
  build/venv/bin/python tools/check_requirements.py
fi
