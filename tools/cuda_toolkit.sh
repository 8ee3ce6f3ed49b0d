#!/bin/bash
# Puts nvcc with its runtime into build/cuda, from PyPI, if no CUDA toolkit is installed.
# Never into the environment of torch, whose nvidia/cu13 folder the compiler's packages would overwrite.
set -euo pipefail
cd "$(dirname "$0")/.."
install() { "$PY" -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target build/cuda "$@"; }

if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ] && [ ! -x build/cuda/nvidia/cu13/bin/nvcc ]; then
  echo "setup: nvcc 13.0 from PyPI into build/cuda"
  install nvidia-cuda-nvcc==13.0.* nvidia-cuda-runtime==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-crt==13.0.* nvidia-cuda-cccl==13.0.*
  ln -s lib build/cuda/nvidia/cu13/lib64  # where nvcc looks
fi
