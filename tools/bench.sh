#!/bin/bash
# Measures this machine, then writes the tables and plots of README.md and docs/benchmarks.md. `make bench` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
build/release/bench/bench_cpu
"$PY" bench/compare_torch.py
"$PY" bench/report.py
