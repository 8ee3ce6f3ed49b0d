"""Times flashdelta beside FlashQLA, FlashInfer and FLA, whichever can be imported, on the same data in one process; and errors.

Usage: python bench/compare.py speed   [--output compare.json] [--seconds 540] [--filter REGEX] [--candidates A,B] [--again]
       python bench/compare.py compile [--seconds 300] [--filter REGEX] [--candidates A,B]    only what speed does first
       python bench/compare.py memory  [--output memory.json] [--row NAME]
       python bench/compare.py errors  [--output errors.json] [--seconds 300] [--seeds 5]
       python bench/compare.py merge OUTPUT INPUT...       one result file of several (later ones win)

Speed: the rows of bench/rows.txt, those with a goal first, then by operation and head counts, in the order of the file. The
candidates of a row take turns, each replaying a CUDA graph of its calls on the same tensors; the host time is that of an eager
call. Peers compile at the first call of new head counts: that is done before, in one process for each peer and head
counts, several at once, so that the compilers' caches (bench/peers.sh env) are warm. What the output file holds already is not
measured again, so that a run that ended for lack of time is continued by the next one.

Memory: the peak of what PyTorch allocates in one forward for training and its backward beyond the inputs.

Errors: worst relative L2 per (sequence, value head) against the float64 recurrence of the tests, median over the seeds. Ends
with exit status 1 if one of ours is more than 1.05 times the best peer's.

The files have Google Benchmark's format; a row of a candidate is called <row>/<candidate>, times are in microseconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import compare_errors
import rows as row_list
from candidates import CANDIDATES, Call, data, load, step_data
from compare_errors import HUGE
from result_file import Deadline, Results, context, merge, progress
from rows import Row

ROUNDS = 20  # replays of each candidate
COMPILE_SHARE = 0.5  # of the time, at most, for compiling ahead
LATE_COMPILE = 150  # seconds that must be left for a row whose peer could not be compiled ahead
MEMORY_ROW = "backward/16/32/1x32768"


class Replays:
    """The calls of one candidate, captured as a graph; on the CPU, or where capturing fails, just called."""

    def __init__(self, calls: list[Call], device: str) -> None:
        self.calls, self.device, self.how = calls, device, "calls"
        self.replay: Callable[[], Any] = self._call_all
        self.samples: list[float] = []
        if device != "cuda":
            return
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._call_all()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._call_all()
            self.replay, self.how = graph.replay, "graph"
        except Exception as problem:  # a candidate that waits for the device or allocates outside PyTorch
            torch.cuda.synchronize()
            self.how = f"calls ({type(problem).__name__}: {str(problem)[:80]})"

    def _call_all(self) -> None:
        for call in self.calls:
            call()

    def run(self, keep: bool = True) -> None:
        """One replay, timed."""
        if self.device == "cuda":
            self.events[0].record()
            self.replay()
            self.events[1].record()
            torch.cuda.synchronize()
            seconds = self.events[0].elapsed_time(self.events[1]) * 1e-3
        else:
            start = time.perf_counter()
            self.replay()
            seconds = time.perf_counter() - start
        if keep:
            self.samples.append(seconds / len(self.calls) * 1e6)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        return ordered[round(q * (len(ordered) - 1))]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def host_microseconds(call: Call, device: str, calls: int = 15) -> float:
    """Median host time of a call while the device is idle: more calls in flight than its queue holds would wait."""
    times = []
    for _ in range(calls):
        synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    synchronize(device)
    return statistics.median(times)


def difference(got: Any, expected: Any) -> float:
    """Largest relative L2 difference of two results; HUGE where there is a NaN."""
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (got, expected)), strict=False)
    worst = 0.0
    for a, b in pairs:
        ratio = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))
        worst = max(worst, ratio if ratio == ratio else HUGE)
    return worst


def calls_of(candidate: Any, row: Row, tensors: Any) -> list[Call]:
    """The calls that one graph holds: for short rows several, for steps one per set of states."""
    made = getattr(candidate, row.operation)(tensors)
    return made if isinstance(made, list) else [made] * (8 if row.tokens * row.HV < 262144 else 1)


def measure_row(row: Row, candidates: dict[str, Any], device: str, results: Results) -> None:
    """Times the candidates of one row in turns, and says how far each is from the first."""
    tensors = step_data(row, device) if row.operation == "step" else data(row, device)
    running: dict[str, tuple[Replays, dict[str, Any]]] = {}
    reference = None
    for name, candidate in candidates.items():
        try:
            start = time.perf_counter()
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            calls = calls_of(candidate, row, tensors)
            got = calls[0]()
            synchronize(device)
            counters: dict[str, Any] = {"first_call_s": round(time.perf_counter() - start, 2)}
            if device == "cuda":
                counters["peak_MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            if reference is None and row.operation != "training_forward":
                reference = got
            if row.operation != "training_forward":
                counters["difference"] = difference(got, reference)
            counters["host_us"] = host_microseconds(calls[0], device)
            running[name] = (Replays(calls, device), counters)
        except Exception as problem:  # one candidate's failure is a result, not the end
            synchronize(device)
            results.add_failure(f"{row.name}/{name}", problem)
    for _ in range(3):
        for replays, _ in running.values():
            replays.run(keep=False)
    for _ in range(ROUNDS if device == "cuda" else 3):
        for replays, _ in running.values():
            replays.run()
    for name, (replays, counters) in running.items():
        counters |= {"p10_us": replays.quantile(0.1), "p90_us": replays.quantile(0.9), "how": replays.how}
        host = counters["host_us"]
        samples = replays.samples
        results.add(f"{row.name}/{name}", len(samples), statistics.median(samples), host, **counters)


class CompileJob(NamedTuple):
    """First calls of one peer for one pair of head counts: what one process compiles."""

    peer: str
    heads: tuple[int, int]
    training: bool  #: forward for training and backward, which share kernels
    rows: tuple[str, ...]


def compile_jobs(chosen: list[Row], candidates: dict[str, Any]) -> list[CompileJob]:
    """All that the peers compile for these rows, the longest jobs first."""
    rows_of: dict[tuple[str, tuple[int, int], bool], list[str]] = {}
    for row in chosen:
        for name, candidate in candidates.items():
            if row.operation in getattr(candidate, "kept_on_disk", ()):
                key = name, (row.H, row.HV), row.operation in ("training_forward", "backward")
                rows_of.setdefault(key, []).append(row.name)
    return sorted((CompileJob(*key, tuple(names)) for key, names in rows_of.items()), key=lambda job: not job.training)


def compile_ahead(jobs: list[CompileJob], processes: int, deadline: Deadline) -> list[CompileJob]:
    """Lets every peer compile what it compiles at first calls; the jobs that were not done in time."""
    late: list[CompileJob] = []
    bar = progress(total=len(jobs), desc="compiling", unit="job")

    def run(job: CompileJob) -> None:
        if deadline.left() <= 0:
            late.append(job)
            return
        command = [sys.executable, __file__, "first-calls", job.peer, *job.rows]
        label = f"{job.peer} {job.heads[0]}/{job.heads[1]}{' training' if job.training else ''}"
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(deadline.left(), 1), check=False)
            said = "compiled" if done.returncode == 0 else f"failed: {' '.join(done.stderr.splitlines()[-1:])[:160]}"
        except subprocess.TimeoutExpired:
            late.append(job)
            said = "not compiled in time"
        bar.write(f"{label}: {said}, {time.monotonic() - start:.0f} s")
        bar.update()

    with ThreadPoolExecutor(max(processes, 1)) as pool:
        list(pool.map(run, jobs))
    bar.close()
    return late


def first_calls(name: str, names: list[str]) -> None:
    found, missing = load([name], "cuda")
    if missing:
        sys.exit(missing[name])
    for row in row_list.rows():
        if row.name in names:
            tensors = step_data(row, "cuda") if row.operation == "step" else data(row, "cuda")
            calls_of(found[name], row, tensors)[0]()
            torch.cuda.synchronize()


def load_some(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The candidates asked for; ends the program where not even flashdelta is among them."""
    found, missing = load(arguments.candidates.split(","), arguments.device)
    for name, reason in missing.items():
        print(f"{name}: left out, {reason}")
    if not any(name.startswith("flashdelta") for name in found):
        sys.exit("compare: flashdelta cannot be imported")
    return found, missing


def rows_to_measure(pattern: str, found: dict[str, Any]) -> list[tuple[Row, dict[str, Any]]]:
    """The rows whose names match with the candidates that can run them, in the order of measuring."""
    chosen: list[tuple[Row, dict[str, Any]]] = []
    for row in row_list.rows():
        if not re.search(pattern, row.name) or (row.operation == "step" and row.layout != "v_first"):
            continue
        able = {name: c for name, c in found.items() if hasattr(c, row.operation)}
        able.pop("flashdelta_split", None)  # the planner splits where that pays
        if row.operation != "forward" or len(row.lengths) > 1:
            able.pop("flashdelta_whole", None)
        chosen.append((row, able))
    groups = {(row.must_ms is None, row.operation, row.H, row.HV): 0 for row, _ in chosen}
    order = {group: i for i, group in enumerate(sorted(groups, key=lambda group: group[0]))}
    return sorted(chosen, key=lambda pair: order[pair[0].must_ms is None, pair[0].operation, pair[0].H, pair[0].HV])


def compile_only(arguments: argparse.Namespace) -> int:
    found, _ = load_some(arguments)
    jobs = compile_jobs([row for row, _ in rows_to_measure(arguments.filter, found)], found)
    late = compile_ahead(jobs, arguments.compile_jobs, Deadline(arguments.seconds))
    print(f"{len(jobs) - len(late)} of {len(jobs)} jobs compiled")
    return 0


def speed(arguments: argparse.Namespace) -> int:
    deadline = Deadline(arguments.seconds)
    device = arguments.device
    found, missing = load_some(arguments)
    results = Results(arguments.output, context("bench/compare.py", found, missing), arguments.again)
    chosen = [
        (row, able)
        for row, able in rows_to_measure(arguments.filter, found)
        if not all(results.has(f"{row.name}/{name}") for name in able)
    ]
    late: list[CompileJob] = []
    if device == "cuda" and arguments.compile_jobs > 0:
        jobs = compile_jobs([row for row, _ in chosen], found)
        late = compile_ahead(jobs, arguments.compile_jobs, Deadline(COMPILE_SHARE * deadline.left()))
    peers_of_late = {name: {job.peer for job in late if name in job.rows} for job in late for name in job.rows}
    chosen.sort(key=lambda pair: pair[0].name in peers_of_late)
    done = 0
    bar = progress(chosen, desc="measuring", unit="row")
    for row, able in bar:
        if deadline.left() < 0:
            break
        bar.set_postfix_str(row.name)
        without = peers_of_late.get(row.name, set()) if deadline.left() < LATE_COMPILE else set()
        with torch.no_grad():
            measure_row(row, {name: c for name, c in able.items() if name not in without}, device, results)
        results.save()
        done += 1
        bar.write(line(row, results) + (f"; not compiled in time: {', '.join(sorted(without))}" if without else ""))
        if device == "cuda":
            torch.cuda.empty_cache()
    bar.close()
    results.save()
    print(f"{done} rows measured, {len(chosen) - done} left for lack of time; {arguments.output}")
    return 0


def memory(arguments: argparse.Namespace) -> int:
    """Peak memory of one layer's forward for training and backward, of every candidate; output and gradients count."""
    found, missing = load_some(arguments)
    results = Results(arguments.output, context("bench/compare.py", found, missing), arguments.again)
    row = next(row for row in row_list.rows() if row.name == arguments.row)
    tensors = data(row, "cuda")

    def peak(candidate: Any) -> float:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call = candidate.backward(tensors)
        gradients = call()
        torch.cuda.synchronize()
        del call, gradients
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    for name, candidate in found.items():
        if not hasattr(candidate, "backward") or name in ("flashdelta_whole", "flashdelta_split"):
            continue
        try:
            with torch.no_grad():
                peak(candidate)  # compiles, tunes, fills caches
                megabytes = peak(candidate)
            results.add(f"memory/{row.name}/{name}", 1, 0.0, 0.0, peak_MB=megabytes)
            print(f"memory/{row.name}/{name}: {megabytes:,.0f} MB")
        except Exception as problem:  # one candidate's failure is a result, not the end
            results.add_failure(f"memory/{row.name}/{name}", problem)
            print(f"memory/{row.name}/{name}: {problem}")
        results.save()
    return 0


def line(row: Row, results: Results) -> str:
    """One row for people: milliseconds of each candidate."""
    parts = []
    for name in CANDIDATES:
        entry = results.benchmarks.get(f"{row.name}/{name}")
        if entry is None:
            continue
        if "error_occurred" in entry:
            parts.append(f"{name} failed ({entry['error_message'][:60]})")
            continue
        apart = f", differs by {entry['difference']:.1e}" if entry.get("difference", 0) > 0.05 else ""
        parts.append(f"{name} {entry['real_time'] / 1e3:.4f} ms (host {entry['host_us']:.0f} us{apart})")
    return f"{row.name:40s} {'; '.join(parts)}"


def errors(arguments: argparse.Namespace) -> int:
    deadline = Deadline(arguments.seconds)
    found, missing = load_some(arguments)
    results = Results(arguments.output, context("bench/compare.py", found, missing), arguments.again)
    above = compare_errors.measure(found, results, arguments.device, arguments.seeds, tuple(arguments.lengths), deadline)
    return 1 if above else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    jobs = max(1, (os.cpu_count() or 2) - 1)
    programs = {
        "speed": (speed, 540.0),
        "compile": (compile_only, 300.0),
        "memory": (memory, 120.0),
        "errors": (errors, 300.0),
    }
    for name, (_, seconds) in programs.items():
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, default=Path("compare.json" if name == "speed" else f"{name}.json"))
        command.add_argument("--seconds", type=float, default=seconds)
        command.add_argument("--candidates", default=",".join(CANDIDATES), help=f"of {', '.join(CANDIDATES)}")
        command.add_argument(
            "--device", choices=("cuda", "cpu") if name in ("speed", "errors") else ("cuda",), default="cuda"
        )
        command.add_argument("--again", action="store_true", help="measure again what the output holds")
        if name in ("speed", "compile"):
            command.add_argument("--filter", default=".", help="regular expression over the rows' names")
            command.add_argument("--compile-jobs", type=int, default=jobs, help="processes that compile ahead; 0: none")
        if name == "memory":
            command.add_argument("--row", default=MEMORY_ROW)
        if name == "errors":
            command.add_argument("--seeds", type=int, default=5)
            command.add_argument("--lengths", type=int, nargs="+", default=[1000, 1048])
    merging = commands.add_parser("merge")
    merging.add_argument("output", type=Path)
    merging.add_argument("inputs", type=Path, nargs="+")
    calling = commands.add_parser("first-calls")
    calling.add_argument("candidate")
    calling.add_argument("rows", nargs="+")
    given = parser.parse_args(arguments)
    if given.command == "merge":
        return merge(given.output, given.inputs)
    if given.command == "first-calls":
        first_calls(given.candidate, given.rows)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("compare: no CUDA device (--device cpu tries the program itself)", file=sys.stderr)
        return 1
    return programs[given.command][0](given)


if __name__ == "__main__":
    raise SystemExit(main())
