#!/bin/bash
# Configures and builds build/NAME. Usage: tools/build.sh NAME [CMake options...]
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
cmake -S . -B "build/$name" -G Ninja --log-level=WARNING "$@" >"build/$name.configure.log" || { cat "build/$name.configure.log"; exit 1; }
cmake --build "build/$name" -j "${JOBS:-$(nproc)}"
