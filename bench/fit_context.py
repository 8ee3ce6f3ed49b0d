"""The constants of src/cuda/context_cost_sm90.hpp from forward rows that bench_gpu measured: prints the header's lines, then
what they predict beside what was measured.

Usage: python bench/fit_context.py bench-forward.json [...]

A row's cycles are taken as that header's formulas add them up from what the planner decided, which bench_gpu writes beside each
row. Rows with one sequence serve: whole (/cp_off) they give the forward's constants, cut those of the pre-pass. EMPTY is what rows
that the planner left whole take longer than the same rows with /cp_off.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any, NamedTuple

import numpy

from rows import rows

CHUNK, VALUES, HEAD_DIM, SMS = 64, 64, 128, 132
WINDOW = 5  # chunks, of heads whose gates decay as bench_gpu draws them
PROFILED = {"WALK_CHUNK": 2050.0, "FOLD_STEP": 2000.0}  # by profiles of the kernels: rows do not tell these and HEAD apart
ABOUT = {
    "HALF_CHUNK": "forward, a chunk, 64 values",
    "FULL_CHUNK": "forward, a chunk, 128 values",
    "WALK_CHUNK": "pre-pass, a chunk, 64 rows of values or transition",
    "RUN": "until a run's first chunk is under way",
    "FOLD_STEP": "from one run's first state to the next's",
    "HEAD": "pre-pass, a run of a head: its window, states in and out",
    "PRE_PASS": "start of the pre-pass's kernels",
    "EMPTY": "likewise, where they find nothing to do",
}


class Sample(NamedTuple):
    """A measured row: how often each constant counts in it, and its cycles."""

    name: str
    counts: dict[str, float]
    cycles: float


def forward_counts(chunks: float, items: int, value_blocks: int) -> dict[str, float]:
    """Of a forward of `items` runs of as many chunks each, on the busiest SM."""
    rounds = -(-items // SMS)
    chunk = "HALF_CHUNK" if value_blocks == HEAD_DIM // VALUES else "FULL_CHUNK"
    return {chunk: rounds * chunks, "RUN": rounds}


def pre_pass_counts(heads: int, entry: dict[str, Any]) -> dict[str, float]:
    """As pre_pass_cost in the header."""
    runs, exact = entry["pre_runs"], entry["exact_heads"]
    length, blocks = entry["pre_chunks"] / runs, HEAD_DIM // VALUES
    rows = exact * (blocks + 2), (heads - exact) * blocks
    even = (rows[0] * length + rows[1] * min(WINDOW, length)) * runs / SMS
    longest = length if exact else min(WINDOW, length)
    rounds = -(-int(rows[0] * runs) // SMS)
    counts = {"PRE_PASS": 1.0, "HEAD": heads * runs / SMS, "FOLD_STEP": runs if exact else 0.0}
    # The largest of three.
    if rounds <= 1 and even > longest:
        return {**counts, "WALK_CHUNK": even, "RUN": sum(rows) * runs / SMS}
    return {**counts, "WALK_CHUNK": max(rounds, 1) * longest, "RUN": max(rounds, 1)}


def samples(benchmarks: list[dict[str, Any]]) -> tuple[list[Sample], list[Sample], list[float]]:
    """Rows of whole sequences, rows of cut ones, and the cycles that nothing cost."""
    entries = {e["name"].split("/iterations")[0]: e for e in benchmarks if not e.get("error_occurred")}
    whole, cut, empty = [], [], []

    def cycles(entry: dict[str, Any]) -> float:
        return float(entry["median_us"] * entry["sm_MHz"])

    for row in rows():
        if row.operation != "forward":
            continue
        for name, entry in entries.items():
            if name != row.name and not name.startswith(row.name + "/"):
                continue
            chunks, off = -(-row.lengths[0] // CHUNK), name.endswith("cp_off")
            if entry.get("pre_runs", 0) > 0 and len(row.lengths) == 1:
                items = int(entry["runs"] * row.HV * entry["value_blocks"])
                counts = forward_counts(chunks / entry["runs"], items, int(entry["value_blocks"]))
                for constant, count in pre_pass_counts(row.HV, entry).items():
                    counts[constant] = counts.get(constant, 0.0) + count
                cut.append(Sample(name, counts, cycles(entry)))
            elif off and len(set(row.lengths)) == 1:
                half = len(row.lengths) * row.HV * 2 <= SMS
                blocks = 2 if half else 1
                counts = forward_counts(chunks, len(row.lengths) * row.HV * blocks, blocks)
                whole.append(Sample(name, counts, cycles(entry)))
            plain = entries.get(name + "/cp_off")
            asked = entry.get("workspace_MB", 0) > 1  # order alone takes less
            same = len(set(row.lengths)) == 1  # otherwise the planner may have chosen another shape
            if plain is not None and asked and same and entry.get("pre_runs") == 0:
                empty.append(cycles(entry) - cycles(plain))
    return whole, cut, empty


def fit(found: list[Sample], known: dict[str, float]) -> dict[str, float]:
    """Constants, none below zero, that leave the least relative errors where `known` ones are given."""
    names = sorted({c for s in found for c in s.counts} - known.keys())
    while names:
        rest = numpy.array([1 - sum(known.get(c, 0.0) * n for c, n in s.counts.items()) / s.cycles for s in found])
        weights = numpy.array([[s.counts.get(c, 0.0) / s.cycles for c in names] for s in found])
        solution = numpy.linalg.lstsq(weights, rest, rcond=None)[0]
        if (solution >= 0).all():
            return known | dict(zip(names, (float(x) for x in solution), strict=True))
        worst = names.pop(int(solution.argmin()))
        known = known | {worst: 0.0}
    return known


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    benchmarks = []
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            benchmarks += json.load(file)["benchmarks"]
    whole, cut, empty = samples(benchmarks)
    constants = fit(cut, fit(whole, {}) | PROFILED)
    if empty:
        constants["EMPTY"] = statistics.median(empty)
    for name, about in ABOUT.items():
        value = f"{constants[name]:.0f}" if name in constants else "not measured"
        print(f"  static constexpr float {name} = {value};  // {about}")
    print(f"\n{'row':44} {'measured':>9} {'predicted':>9}  cycles")
    for sample in whole + cut:
        predicted = sum(constants.get(c, 0.0) * count for c, count in sample.counts.items())
        print(f"{sample.name:44} {sample.cycles:9.0f} {predicted:9.0f}  {100 * (predicted / sample.cycles - 1):+.0f} %")


if __name__ == "__main__":
    main()
