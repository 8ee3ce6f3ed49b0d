#!/bin/bash
# Tests and measures on a machine with a Hopper GPU: every step has its own log and time limit, and a failure does not stop the
# others. Ends with a table, and with exit status 1 if a step failed. `make gpu` calls it.
#
# Usage: tools/gpu.sh [options]
#   --prebuilt PACK     programs of tools/gpu_pack.sh (the file or the unpacked folder) instead of building here
#   --steps A,B,...     only these; by default all: info smoke step forward others cpu python memcheck racecheck synccheck initcheck
#                       stress demo training bench memory errors compare
#   --together yes      the steps at the same time, where nothing that is timed is among them
#   --seconds S         for all steps together (default 3600): a step starts only if time is left, and ends in time
#   --out DIR           logs and results (default build/gpu-out)
#   --archive FILE      also packs DIR into FILE (.tar.xz) after every step, for machines that are lost at the end
#   --stress F,B,S      batches of forward, backward and step in the stress program (default 10000,2000,2000)
#   --compare 'ARGS'    more arguments of bench/compare.py (its --seconds is set here)
#   --filter REGEX      rows of the benchmarks (default: all)
# PYTHON: the interpreter with torch (default python3). Peers for `compare` and `errors`: bench/peers.sh unpacks them.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
prebuilt="" together="" seconds=3600 out=build/gpu-out archive="" stress=10000,2000,2000 compare="" filter=.
steps=info,smoke,step,forward,others,cpu,python,memcheck,racecheck,synccheck,initcheck,stress,demo,training,bench,memory,errors,compare
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-; exit 0 ;;
    --prebuilt) prebuilt=$2 ;;
    --steps) steps=$2 ;;
    --together) together=$2 ;;
    --seconds) seconds=$2 ;;
    --out) out=$2 ;;
    --archive) archive=$2 ;;
    --stress) stress=$2 ;;
    --compare) compare=$2 ;;
    --filter) filter=$2 ;;
    *) echo "gpu: unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
mkdir -p "$out"
out=$(realpath "$out")
python=${PYTHON:-python3}

if [ -z "$prebuilt" ]; then
  tools/gpu_pack.sh --folder || { echo "gpu: the build failed"; exit 1; }
  prebuilt=build/gpu-pack
elif [ -f "$prebuilt" ]; then
  mkdir -p build/gpu-pack
  tar xJf "$prebuilt" -C build/gpu-pack || exit 1
  prebuilt=build/gpu-pack
fi
pack=$(realpath "$prebuilt")
programs=$pack/bin traps=$pack/traps
FLASHDELTA_COMMIT=$(head -n 1 "$pack/commit")  # for the results of bench/compare.py, where there is no checkout
export FLASHDELTA_COMMIT
export FLASHDELTA_LIBRARY=$pack/programs/libflashdelta.so
export PYTHONPATH=$PWD/python:$PWD/tests/python:${PYTHONPATH:-}
"$python" -c "import hypothesis, pytest, tqdm" 2>/dev/null || PYTHONPATH=$PYTHONPATH:$pack/site
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE

# A program of the pack, with the pack's libraries; python keeps its own.
program() {
  local name=$1
  shift
  LD_LIBRARY_PATH=$pack/lib "$programs/$name" "$@"
}
sanitizer() {
  local found
  found=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
  [ -n "$found" ] || { echo "compute-sanitizer is not installed"; return 1; }
  local status=0 folder=$programs
  # Of the two builds the race check knows only what orders the threads of the second (src/cuda/block_sm90.cuh).
  [ "$1" != racecheck ] || [ ! -x "$traps/gpu_test" ] || folder=$traps
  for test in "$folder"/gpu*_test; do
    LD_LIBRARY_PATH=$pack/lib "$found" --tool "$1" --error-exitcode 9 --print-limit 20 "$test" --gtest_filter='*Small*' ||
      { status=1; echo "$(basename "$test"): $1 found something"; }
  done
  return $status
}
# What the waits for barriers say when they take too long; after a test that did not end.
explain_hang() {
  [ -x "$traps/$1" ] || return 0
  echo "--- again with waits that end"
  LD_LIBRARY_PATH=$pack/lib timeout -k 5 60 "$traps/$1" --gtest_filter="${2:-*}" 2>&1 | tail -40
}
tests() {  # program, filter; a run in which every test was skipped is none
  local log
  log=$(mktemp)
  program "$1" --gtest_filter="${2:-*}" 2>&1 | tee "$log"
  local status=${PIPESTATUS[0]}
  ! grep -q "PASSED  \] 0 tests" "$log" || status=1
  rm -f "$log"
  [ "$status" = 0 ] || echo "$1: exit status $status"
  return "$status"
}

run_info() {
  nvidia-smi
  "$python" -m flashdelta info && cat /proc/cpuinfo | grep -m1 "model name"
  echo "programs of commit:" && cat "$pack/commit"
}
run_smoke() { tests gpu_forward_test '*Small*/Tokens64*'; }
run_step() { tests gpu_test; }
run_forward() { tests gpu_forward_test; }
run_others() {
  local status=0 shards=()
  for test in "$programs"/gpu*_test; do
    case $(basename "$test") in gpu_test | gpu_forward_test) continue ;; esac
    for shard in 0 1 2 3; do  # the reference takes the time, on one core each
      GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=$shard tests "$(basename "$test")" &
      shards+=($!)
    done
  done
  [ ${#shards[@]} -gt 0 ] || echo "no other GPU test is built"
  for shard in "${shards[@]}"; do wait "$shard" || status=1; done
  return $status
}
run_cpu() {
  local status=0
  for test in forward_test backward_test step_test random_test; do tests $test || status=1; done
  return $status
}
run_python() { "$python" -m pytest -q -p no:cacheprovider tests/python/test_cuda.py; }
run_memcheck() { sanitizer memcheck; }
run_racecheck() { sanitizer racecheck; }
run_synccheck() { sanitizer synccheck; }
run_initcheck() { sanitizer initcheck; }
# Each operation by itself: one that is wrong ends its own run.
run_stress() {
  local status=0 batches operations=(forward backward step)
  IFS=, read -ra batches <<<"$stress"
  for i in 1 2 0; do  # the most batches last
    [ "${batches[i]:-0}" -gt 0 ] || continue
    program stress --device cuda --operations "${operations[i]}" --batches "${batches[i]}" --seconds "$1" \
      --output "$out/stress-${operations[i]}.json" --commit "$FLASHDELTA_COMMIT" || status=1
  done
  return $status
}
# `make demo` without its build: the library is there.
run_demo() {
  mkdir -p build/release && cp "$FLASHDELTA_LIBRARY" build/release/ && make -o all demo PYTHON="$python" DEMO="--seconds 20"
}
run_training() { "$python" bench/training.py --output "$out/training.json" --seconds $(($1 / 2)); }
run_memory() { "$python" bench/compare.py memory --output "$out/memory.json"; }
# Each operation in a process of its own: an error of the device in one leaves the others.
run_bench() {
  local status=0
  for operation in forward step backward training_forward; do
    program bench_gpu --list | grep "^$operation/" | grep -Eq "$filter" || continue
    program bench_gpu --operation=$operation --benchmark_filter="$filter" --benchmark_out="$out/bench-$operation.json" \
      --benchmark_out_format=json || status=1
  done
  return $status
}
run_compare() {
  "$python" bench/compare.py speed --output "$out/compare.json" --filter "$filter" --seconds $(($1 - 15)) $compare
}
run_errors() { "$python" bench/compare.py errors --output "$out/errors.json" --seconds $(($1 - 15)); }

declare -A limits=([info]=60 [smoke]=60 [step]=180 [forward]=240 [others]=240 [cpu]=240 [python]=240 [memcheck]=240 [racecheck]=240
  [synccheck]=240 [initcheck]=240 [stress]=300 [demo]=150 [training]=240 [bench]=300 [memory]=120 [compare]=3600 [errors]=300)
# Runs a step and leaves the line that it gets in the table.
perform() {
  local step=$1 limit=$2 start=$SECONDS log=$out/$1.log result=passed
  # In a process group of its own, so that nothing of it lives on.
  timeout -k 5 "$limit" bash -c "run_$step $limit" >"$log" 2>&1
  local status=$?
  [ $status = 0 ] || result=FAILED
  if [ $status = 124 ] || [ $status = 137 ]; then
    result="TIMEOUT"
    case $step in
      smoke) explain_hang gpu_forward_test '*Small*/Tokens64*' ;;
      forward) explain_hang gpu_forward_test ;;
      others) for test in "$traps"/gpu_[a-z]*_test; do [ "$test" = "$traps/gpu_forward_test" ] || explain_hang "$(basename "$test")"; done ;;
    esac >>"$log" 2>&1
  fi
  local said
  said=$(grep -E '^\[  (PASSED|FAILED)  \] [0-9]+ test|batches in|ERROR SUMMARY|RACECHECK SUMMARY|[0-9]+ (passed|failed|skipped)|^held out|^training:|^memory/|rows' "$log" |
    tail -1 | cut -c1-70)
  printf '%-10s %-8s %4d s  %s\n' "$step" "$result" $((SECONDS - start)) "$said" >"$out/$step.line"
  cat "$out/$step.line"
  [ "$result" = passed ] || tail -n 15 "$log" | cut -c1-180 | sed 's/^/    /'
}

rm -f "$out"/*.line
export -f program sanitizer explain_hang tests
export pack programs traps python out filter stress compare
for step in ${steps//,/ }; do
  [ -n "${limits[$step]:-}" ] || { echo "gpu: no step $step"; exit 2; }
  export -f "run_$step"
  left=$((seconds - SECONDS)) limit=${limits[$step]}
  [ $limit -le $left ] || limit=$left
  if [ $limit -lt 20 ]; then
    printf '%-10s %-8s\n' "$step" "no time" >"$out/$step.line"
  elif [ -n "$together" ]; then
    perform "$step" "$limit" &
  else
    perform "$step" "$limit"
  fi
  if [ "$step" = smoke ] && [ -z "$together" ] && ! grep -q passed "$out/smoke.line"; then  # what builds on it gets less time
    for later in forward others python stress demo training bench; do limits[$later]=60; done
  fi
  [ -z "$archive" ] || [ -n "$together" ] || XZ_OPT=-1 tar cJf "$archive" -C "$out" .
done
wait
for step in ${steps//,/ }; do cat "$out/$step.line"; done >"$out/summary.txt"
[ -z "$archive" ] || XZ_OPT=-1 tar cJf "$archive" -C "$out" .
failed=$(grep -cv passed "$out/summary.txt")
printf '\n%s\n%d of the steps failed or had no time, %d s\n' "$(cat "$out/summary.txt")" "$failed" $SECONDS
[ "$failed" = 0 ]
