#!/bin/bash
# The public kernels that bench/compare.py measures beside ours, in the versions of the published results, for a machine without
# a network whose Python is 3.12 and has torch: packed here from PyPI, carried in parts, unpacked there. Two sets: `base`
# (FlashQLA, flash-linear-attention) works alone, `flashinfer` needs the other beside it.
#
# Usage: bench/peers.sh pack DIR [MB]       DIR/base.00, DIR/flashinfer.00, ... of at most so many megabytes (default 46)
#        bench/peers.sh unpack DIR SITE     keeps the parts that are in DIR; unpacks a set into SITE once all of it has come
#        bench/peers.sh env SITE [CACHE]    prints what to evaluate in the shell:  eval "$(bench/peers.sh env SITE)"; what
#                                           the peers compile goes into CACHE (default SITE-cache)
#        bench/peers.sh save CACHE DIR      what they compiled, as DIR/cache.00, ... of at most 15 MB
#        bench/peers.sh restore DIR CACHE   the way back; nothing where DIR holds no such parts
set -euo pipefail

declare -A packages=(
  [base]="flash-qla==0.1.3 tilelang==0.1.15 apache-tvm-ffi==0.1.12 torch-c-dlpack-ext==0.1.5 z3-solver==4.15.4
    fla-core==0.6.0 flash-linear-attention==0.6.0"
  # With the compiler of its kernels.
  [flashinfer]="flashinfer-python==0.7.2.post1 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1
    nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1 nvidia-cudnn-frontend==1.32.0 cuda-tile==1.7.0
    nccl4py==0.6.0 requests==2.34.2 charset-normalizer==3.5.2"
)

# What the gated delta rule on Hopper does not need: sources and plans of other kernels, second copies of libraries.
slim() {
  rm -rf "$1"/flashinfer/data/{csrc,cutlass,cccl,include} "$1/flashinfer/moe_ep/kernel_src"
  [ ! -d "$1/flashinfer/experimental" ] ||
    find "$1/flashinfer/experimental" -type f \( -name '*.cu' -o -name '*.cuh' -o -name '*.json' \) -delete
  rm -rf "$1"/tilelang/3rdparty/tvm/src "$1"/tilelang/3rdparty/cutlass/tools "$1"/z3_solver-*.data
  [ ! -f "$1/z3/lib/libz3.so.4.15" ] || ln -sf libz3.so.4.15 "$1/z3/lib/libz3.so"
}

pack() {
  local dir megabytes=${2:-46} work platforms=()
  mkdir -p "$1"
  dir=$(realpath "$1")
  work=$(mktemp -d)
  trap "rm -rf '$work'" EXIT
  for tag in 2_17 2_24 2_26 2_27 2_28 2_31 2_34 2_35; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
  rm -f "$dir"/{base,flashinfer}.*
  for set in base flashinfer; do
    "${PY:-python3}" -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --implementation cp \
      --python-version 3.12 "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$work/$set.wheels" \
      ${packages[$set]}
    mkdir "$work/$set"
    for wheel in "$work/$set.wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$work/$set"; done
    slim "$work/$set"
    tar c -C "$work/$set" . | xz -T0 --x86 --lzma2=preset=6,dict=32MiB | split -b "${megabytes}M" -d - "$dir/$set."
    local parts=("$dir/$set".*)
    echo "${#parts[@]}" >"$dir/$set.count"
    du -m "${parts[@]}"
  done
}

unpack() {
  local kept=$2/.parts
  mkdir -p "$kept"
  cp "$1"/{base,flashinfer}.* "$kept/" 2>/dev/null || true
  for set in base flashinfer; do
    [ -f "$kept/$set.count" ] || continue
    local parts=("$kept/$set".[0-9]*)
    if [ "${#parts[@]}" -lt "$(cat "$kept/$set.count")" ]; then
      echo "peers: $set, ${#parts[@]} of $(cat "$kept/$set.count") parts so far"
      continue
    fi
    cat "${parts[@]}" | xz -dc -T0 | tar x -C "$2"
    rm "$kept/$set".*
    echo "peers: $set unpacked into $2"
  done
}

environment() {
  local cache=$2 path=$1:$1/nvidia_cutlass_dsl/dsl_packages
  for folder in "$1"/*.data/purelib "$1"/*.data/platlib; do [ ! -d "$folder" ] || path=$path:$folder; done
  echo "export PYTHONPATH=$path\${PYTHONPATH:+:\$PYTHONPATH}"
  echo "export TILELANG_CACHE_DIR=$cache/tilelang TRITON_CACHE_DIR=$cache/triton FLASHINFER_WORKSPACE_BASE=$cache/flashinfer"
}

save() {
  mkdir -p "$2"
  rm -f "$2"/cache.*
  tar c -C "$1" --exclude=.staging . | xz -T0 -3 | split -b 15M -d - "$2/cache."
  du -m "$2"/cache.*
}

restore() {
  local parts=("$1"/cache.[0-9]*)
  [ -f "${parts[0]}" ] || return 0
  mkdir -p "$2"
  cat "${parts[@]}" | xz -dc -T0 | tar x -C "$2"
  echo "peers: ${#parts[@]} parts of compiled kernels restored into $2"
}

case ${1:-} in
  pack) pack "${@:2}" ;;
  unpack) unpack "${@:2}" ;;
  env) environment "$(realpath "$2")" "$(realpath -m "${3:-$2-cache}")" ;;
  save) save "${@:2}" ;;
  restore) restore "${@:2}" ;;
  *) grep '^# Usage' -A6 "$0" | cut -c3- >&2; exit 2 ;;
esac
