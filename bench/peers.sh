#!/bin/bash
# The public kernels that bench/compare.py measures beside ours, in the versions of the published results, for a machine without
# a network whose Python is 3.12 and has torch: packed here from PyPI, carried in parts, unpacked there.
#
# Usage: bench/peers.sh pack DIR [MB]     DIR/peers.00, DIR/peers.01, ... of at most so many megabytes (default 56)
#        bench/peers.sh unpack DIR SITE   keeps the parts that are in DIR; unpacks into SITE once all have come
#        bench/peers.sh env SITE          prints what to evaluate in the shell:  eval "$(bench/peers.sh env SITE)"
set -euo pipefail

packages=(
  # FlashQLA and flash-linear-attention
  flash-qla==0.1.3 tilelang==0.1.15 apache-tvm-ffi==0.1.12 torch-c-dlpack-ext==0.1.5 z3-solver==4.15.4
  fla-core==0.6.0 flash-linear-attention==0.6.0
  # FlashInfer with the compiler of its kernels
  flashinfer-python==0.7.2.post1 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1
  nvidia-cutlass-dsl-libs-cu13==4.8.1 nvidia-cudnn-frontend==1.32.0 cuda-tile==1.7.0 nccl4py==0.6.0 requests==2.34.2
  charset-normalizer==3.5.2
)

pack() {
  local dir megabytes=${2:-56} work platforms=()
  mkdir -p "$1"
  dir=$(realpath "$1")
  work=$(mktemp -d)
  trap "rm -rf '$work'" EXIT
  for tag in 2_17 2_24 2_26 2_27 2_28 2_31 2_34 2_35; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
  "${PY:-python3}" -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version 3.12 "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$work/wheels" \
    "${packages[@]}"
  mkdir "$work/site"
  for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done
  # Sources and prebuilt plans of FlashInfer's other kernels: the gated delta rule on Hopper needs none of them.
  rm -rf "$work"/site/flashinfer/data/{csrc,cutlass,cccl,include} "$work/site/flashinfer/moe_ep/kernel_src"
  find "$work/site/flashinfer/experimental" -type f \( -name '*.cu' -o -name '*.cuh' -o -name '*.json' \) -delete
  rm -f "$dir"/peers.*
  tar c -C "$work/site" . | xz -T0 -6 | split -b "${megabytes}M" -d - "$dir/peers."
  local parts=("$dir"/peers.*)
  echo "${#parts[@]}" >"$dir/peers.count"
  du -m "${parts[@]}"
}

unpack() {
  local kept=$2/.parts
  mkdir -p "$kept"
  cp "$1"/peers.* "$kept/"
  local parts=("$kept"/peers.[0-9]*)
  if [ ! -f "$kept/peers.count" ] || [ "${#parts[@]}" -lt "$(cat "$kept/peers.count")" ]; then
    echo "peers: ${#parts[@]} parts so far"
    return
  fi
  cat "${parts[@]}" | xz -dc -T0 | tar x -C "$2"
  rm -rf "$kept"
  echo "peers: unpacked into $2"
}

environment() {
  local path=$1:$1/nvidia_cutlass_dsl/dsl_packages
  for folder in "$1"/*.data/purelib "$1"/*.data/platlib; do [ ! -d "$folder" ] || path=$path:$folder; done
  echo "export PYTHONPATH=$path\${PYTHONPATH:+:\$PYTHONPATH}"
}

case ${1:-} in
  pack) pack "${@:2}" ;;
  unpack) unpack "${@:2}" ;;
  env) environment "$(realpath "$2")" ;;
  *) grep '^# Usage' -A2 "$0" >&2; exit 2 ;;
esac
