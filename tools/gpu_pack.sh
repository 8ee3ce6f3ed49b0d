#!/bin/bash
# Builds everything that tools/gpu.sh runs, here, and packs it into one file for a machine with a Hopper GPU that has no network
# or no compiler: programs with the shared libraries they need, the library, pytest for that machine's Python.
#
# Usage: tools/gpu_pack.sh [--out build/gpu-pack.tar.xz] [--build build/gpu] [--python 3.12] [--without-traps] [--folder]
#   --without-traps   leaves out the second build, whose waits for barriers end in a message instead of a hang, and whose
#                     arrivals at barriers the race check can follow
#   --folder          only the folder build/gpu-pack, without pytest, for this machine
# There: tools/gpu.sh --prebuilt gpu-pack.tar.xz
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/gpu-pack.tar.xz build=build/gpu python=3.12 traps=yes folder=
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift ;;
    --build) build=$2; shift ;;
    --python) python=$2; shift ;;
    --without-traps) traps= ;;
    --folder) folder=yes ;;
    *) echo "gpu_pack: unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
pack=$build-pack
rm -rf "$pack"
mkdir -p "$pack"/{bin,traps,lib,site} "$build"

# Release programs in $1; further arguments are options of CMake.
build_programs() {
  local folder=$1
  shift
  cmake -S . -B "$folder" -G Ninja --log-level=WARNING -DFLASHDELTA_CUDA=ON -DFLASHDELTA_TESTS=ON -DFLASHDELTA_BENCH=ON \
    -DFLASHDELTA_EXAMPLES=OFF -DCMAKE_BUILD_TYPE=Release "$@" >"$folder.log" || { cat "$folder.log"; return 1; }
  cmake --build "$folder" -j "${JOBS:-$(nproc)}" --target "${targets[@]}" >>"$folder.log" 2>&1 ||
    { grep -v "ptxas info\|bytes stack frame" "$folder.log" | tail -40; return 1; }
}

mapfile -t gpu_tests < <(find tests -maxdepth 1 -name 'gpu*_test.cpp' -printf '%f\n' | sed 's/\.cpp$//' | sort)
cpu_tests=(forward_test backward_test step_test random_test)
targets=(flashdelta "${gpu_tests[@]}" "${cpu_tests[@]}" stress bench_gpu bench_cpu)
build_programs "$build"
for name in "${gpu_tests[@]}" "${cpu_tests[@]}" stress; do strip -o "$pack/bin/$name" "$build/tests/$name"; done
for name in bench_gpu bench_cpu; do strip -o "$pack/bin/$name" "$build/bench/$name"; done
strip -o "$pack/lib/libflashdelta.so" "$build/libflashdelta.so"
if [ -n "$traps" ]; then
  targets=("${gpu_tests[@]}")
  build_programs "$build-traps" -DCMAKE_CUDA_FLAGS="-DFLASHDELTA_SPIN_LIMIT=20000000 -DFLASHDELTA_ARRIVE_BY_LANES"
  for name in "${gpu_tests[@]}"; do strip -o "$pack/traps/$name" "$build-traps/tests/$name"; done
fi
# Shared libraries, but not those of the C library, which belong to the machine.
ldd "$pack"/bin/* | awk '$3 ~ /^\// {print $3}' | sort -u | grep -Ev '/lib(c|m|dl|rt|pthread)\.so' | xargs -I{} cp -L {} "$pack/lib/"
mkdir "$pack/programs" && mv "$pack/lib/libflashdelta.so" "$pack/programs/"

{ git rev-parse --short HEAD && git status --porcelain -uno; } >"$pack/commit" 2>/dev/null || true
[ -z "$folder" ] || exit 0

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
platforms=()
for tag in 2_17 2_24 2_26 2_27 2_28 2_31 2_34 2_35; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
"${PY:-python3}" -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "$python" "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$wheels" \
  $(grep -E '^(pytest|hypothesis|tqdm)==' requirements.txt) pluggy iniconfig packaging pygments sortedcontainers
for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$pack/site"; done
rm -rf "$pack"/site/pygments/lexers/_*_builtins.py

XZ_OPT="-T0 -6" tar cJf "$out" -C "$pack" .
du -h "$out"
