"""Times flashdelta beside FlashQLA, FlashInfer and FLA, whichever can be imported, on the same data in one process; and errors.

Usage: python bench/compare.py speed  [--output compare.json] [--seconds 540] [--filter REGEX] [--candidates A,B] [--again]
       python bench/compare.py errors [--output errors.json] [--seconds 300] [--seeds 5]
       python bench/compare.py merge OUTPUT INPUT...       one result file of several (later ones win)

Speed: the rows of bench/rows.txt in their order. The candidates of a row take turns, each replaying a CUDA graph of its calls on
the same tensors; the host time is that of an eager call. Peers compile at the first call of new head counts: that is done
before, in several processes at once, so that the compilers' caches are warm. What the output file holds already is not measured
again, so that a run that ended for lack of time is continued by the next one.

Errors: worst relative L2 per (sequence, value head) against the float64 recurrence of the tests, median over the seeds.

The files have Google Benchmark's format; a row of a candidate is called <row>/<candidate>, times are in microseconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus
from tqdm import tqdm

import rows as row_list
from candidates import CANDIDATES, SCALE, Call, Data, K, data, load, step_data
from rows import Row

ROOT = Path(__file__).parents[1]
ROUNDS = 20  # replays of each candidate
HUGE = 1e30  # an error that is not a number
COMPILE_SHARE = 0.5  # of the time, at most, for compiling ahead
OPERATIONS = ("forward", "training_forward", "backward", "step")
KINDS = ("random", "correlated", "decay")
RESULTS = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")


def commit() -> str:
    """The commit of the library: what FLASHDELTA_COMMIT says of one that was built elsewhere, else that of the checkout."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    given = os.environ.get("FLASHDELTA_COMMIT")
    return given or subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def context(found: dict[str, Any], missing: dict[str, str]) -> dict[str, Any]:
    """What Google Benchmark says of a run, and what it cannot know."""
    cuda = torch.cuda.is_available()
    driver = ""
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: candidate.version for name, candidate in found.items()}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "host_name": platform.node(),
        "executable": "bench/compare.py",
        "num_cpus": os.cpu_count(),
        "library_build_type": "release",
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "driver": driver,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(["python", "bench/compare.py", *sys.argv[1:]]),
        **versions,
        **{f"{name}_missing": reason for name, reason in missing.items()},
    }


class Results:
    """A result file that is kept complete on disk after every row."""

    def __init__(self, path: Path, about: dict[str, Any], again: bool) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path.exists() and not again else {"benchmarks": []}
        self.benchmarks: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in old["benchmarks"]}
        self.context = about

    def has(self, name: str) -> bool:
        """Whether this commit's number is there (peers' numbers do not depend on it)."""
        entry = self.benchmarks.get(name)
        if entry is None or "error_occurred" in entry:
            return False
        return "flashdelta" not in name or entry.get("commit") == self.context["commit"]

    def add(self, name: str, iterations: int, microseconds: float, host: float, **counters: Any) -> None:
        entry = {"name": name, "run_name": name, "run_type": "iteration", "repetitions": 1, "iterations": iterations}
        entry |= {"real_time": microseconds, "cpu_time": host, "time_unit": "us", "commit": self.context["commit"]}
        self.benchmarks[name] = entry | counters

    def add_failure(self, name: str, reason: str) -> None:
        entry = {"name": name, "run_name": name, "run_type": "iteration", "error_occurred": True, "error_message": reason}
        self.benchmarks[name] = entry

    def save(self) -> None:
        text = json.dumps({"context": self.context, "benchmarks": list(self.benchmarks.values())}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(self.path)


def progress(*arguments: Any, **options: Any) -> Any:
    """A progress bar; none in a log."""
    return tqdm(*arguments, disable=None, **options)


class Deadline:
    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)


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
            results.add_failure(f"{row.name}/{name}", f"{type(problem).__name__}: {problem}"[:300])
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


def compile_ahead(chosen: list[Row], candidates: dict[str, Any], jobs: int, deadline: Deadline) -> None:
    """Lets every peer compile what it compiles at first calls, each head count in a process of its own, several at once."""
    peers = [name for name in candidates if not name.startswith("flashdelta")]
    jobs_of: dict[tuple[str, str, int, int], dict[Any, str]] = {}  # one row for every kernel that may be chosen
    for row in chosen:
        path = (row.lengths[0], row.state_type) if row.operation == "step" else len(row.lengths) == 1
        for name in peers:
            if hasattr(candidates[name], row.operation):
                jobs_of.setdefault((name, row.operation, row.H, row.HV), {}).setdefault(path, row.name)
    bar = progress(total=len(jobs_of), desc="compiling", unit="job")

    def run(job: tuple[tuple[str, str, int, int], dict[Any, str]]) -> None:
        (name, *_), names = job
        if deadline.left() > 0:
            command = [sys.executable, __file__, "first-calls", name, *names.values()]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=max(deadline.left(), 1), check=False)
                if done.returncode != 0:
                    bar.write(f"first call of {name} failed: {' '.join(done.stderr.splitlines()[-1:])[:160]}")
            except subprocess.TimeoutExpired:
                bar.write(f"no time to compile ahead: {name} {' '.join(names.values())}")
        bar.update()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, jobs_of.items()))
    bar.close()


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


def speed(arguments: argparse.Namespace) -> int:
    deadline = Deadline(arguments.seconds)
    device = arguments.device
    found, missing = load_some(arguments)
    results = Results(arguments.output, context(found, missing), arguments.again)
    pattern = re.compile(arguments.filter)
    chosen: list[tuple[Row, dict[str, Any]]] = []
    for row in row_list.rows():
        if not pattern.search(row.name) or (row.operation == "step" and row.layout != "v_first"):
            continue
        able = {name: c for name, c in found.items() if hasattr(c, row.operation)}
        able.pop("flashdelta_split", None)  # the planner splits where that pays
        if row.operation != "forward" or len(row.lengths) > 1:
            able.pop("flashdelta_whole", None)
        if not all(results.has(f"{row.name}/{name}") for name in able):
            chosen.append((row, able))
    if device == "cuda":
        compile_ahead([row for row, _ in chosen], found, arguments.compile_jobs, Deadline(COMPILE_SHARE * deadline.left()))
    done = 0
    bar = progress(chosen, desc="measuring", unit="row")
    for row, able in bar:
        if deadline.left() < 0:
            break
        bar.set_postfix_str(row.name)
        with torch.no_grad():
            measure_row(row, able, device, results)
        results.save()
        done += 1
        bar.write(line(row, results))
        if device == "cuda":
            torch.cuda.empty_cache()
    bar.close()
    results.save()
    print(f"{done} rows measured, {len(chosen) - done} left for lack of time; {arguments.output}")
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


# Errors.


def error_data(kind: str, seed: int, device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> Data:
    """Random tensors; "correlated": keys in one direction, strengths near 1; "decay": strong decay."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    H, HV, T, N = 2, 8, sum(lengths), len(lengths)
    q, k, v = normal(1, T, H, K), normalize(normal(1, T, H, K), dim=-1), normal(1, T, HV, K)
    g, beta = logsigmoid(normal(1, T, HV)) / 16, normal(1, T, HV).sigmoid()
    g[..., ::4] = 0
    if kind == "correlated":
        k = normal(1, 1, H, K) + 0.1 * normal(1, T, H, K)
        beta, g = 0.9 + 0.1 * beta, 0.01 * g
    if kind == "decay":
        rate = 16 * torch.rand(HV, generator=generator, device=device)
        g = -rate * softplus(normal(1, T, HV))
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v, do = (x.to(dtype) for x in (q, k, v, normal(1, T, HV, K)))
    return Data(q, k, v, g, beta, normal(N, HV, K, K), ends, do, normal(N, HV, K, K) / 8, lengths)


def truth(d: Data) -> dict[str, Tensor]:
    """Results and gradients of the float64 recurrence."""
    sys.path.insert(0, str(ROOT / "tests/python"))
    from reference import gated_delta_rule

    leaves = [x.double().requires_grad_() for x in (d.q, d.k, d.v, d.g, d.beta, d.initial_state)]
    with torch.enable_grad(), torch.device(d.q.device):
        o, final = gated_delta_rule(*leaves[:5], initial_state=leaves[5], scale=SCALE, cu_seqlens=d.cu_seqlens)
        loss = (o * d.do.double()).sum() + (final * d.dfinal_state.double()).sum()
    return dict(zip(RESULTS, (o.detach(), final.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


def worst_error(name: str, got: Tensor, expected: Tensor, d: Data) -> float:
    """Worst relative L2 error per (sequence, head); HUGE where there is a NaN."""
    got, expected = got.double(), expected.double()
    if name in ("final_state", "dinitial_state"):
        parts = [(got.flatten(2), expected.flatten(2))]
    else:
        ends = d.cu_seqlens.tolist()
        cut = [(got[:, a:b], expected[:, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        parts = [tuple(x.transpose(1, 2).flatten(2) for x in pair) for pair in cut]  # type: ignore[misc]
    ratios = torch.cat([((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).flatten() for a, b in parts])
    return float(torch.nan_to_num(ratios, nan=HUGE, posinf=HUGE).max())


def errors_of(candidate: Any, d: Data, expected: dict[str, Tensor]) -> dict[str, float]:
    """The error of every result the candidate has."""
    with torch.no_grad():
        got: dict[str, Tensor] = dict(zip(RESULTS[:2], candidate.forward(d)(), strict=True))
        if hasattr(candidate, "backward"):
            try:
                got |= dict(zip(RESULTS[2:], candidate.backward(d)(), strict=True))
            except NotImplementedError as reason:
                tqdm.write(f"no gradients: {reason}")
    return {name: worst_error(name, x, expected[name], d) for name, x in got.items()}


def errors(arguments: argparse.Namespace) -> int:
    deadline = Deadline(arguments.seconds)
    found, missing = load_some(arguments)
    results = Results(arguments.output, context(found, missing), arguments.again)
    lengths = tuple(arguments.lengths)
    cells = [(kind, dtype) for dtype in (torch.bfloat16, torch.float16) for kind in KINDS]
    bar = progress(total=len(cells) * arguments.seeds, desc="errors", unit="set")
    for kind, dtype in cells:
        seen: dict[str, list[dict[str, float]]] = {}
        for seed in range(arguments.seeds):
            if deadline.left() < 0:
                break
            d = error_data(kind, seed, arguments.device, dtype, lengths)
            expected = truth(d)
            for name, candidate in found.items():
                if dtype == torch.float16 and not name.startswith("flashdelta"):
                    continue  # the goal of fp16 is a share of bf16's error
                try:
                    seen.setdefault(name, []).append(errors_of(candidate, d, expected))
                except Exception as problem:
                    label = f"errors/{kind}/{str(dtype)[6:]}/{name}"
                    results.add_failure(label, f"{type(problem).__name__}: {problem}"[:300])
            bar.update()
        for name, values in seen.items():
            label = f"errors/{kind}/{str(dtype)[6:]}/{name}"
            medians = {result: statistics.median(v[result] for v in values) for result in values[0]}
            results.add(label, len(values), 0.0, 0.0, **medians)
            shown = ", ".join(f"{result} {value:.2e}" for result, value in medians.items())
            bar.write(f"{label}: {shown}")
        results.save()
    bar.close()
    print(f"rows of errors: {arguments.output}")
    return 0


def merge(output: Path, inputs: list[Path]) -> int:
    """One file of several of the same GPU: rows of the later ones win, what they say of their runs is kept by name."""
    merged: dict[str, Any] = {"context": {}, "benchmarks": []}
    entries: dict[str, Any] = {}
    status = 0
    for path in inputs:
        try:
            part = json.loads(path.read_text())
        except json.JSONDecodeError:
            print(f"compare: {path} is cut short: left out", file=sys.stderr)
            status = 1
            continue
        gpu = part["context"].get("gpu")
        if merged["context"].get("gpu", gpu) != gpu:
            print(f"compare: {path} is of {gpu}, others are of {merged['context']['gpu']}", file=sys.stderr)
            return 1
        commands = [*merged["context"].get("commands", []), *part["context"].pop("commands", [])]
        command = part["context"].pop("command", None)
        merged["context"] |= part["context"]
        merged["context"]["commands"] = [*commands, *([command] if command else [])]
        for entry in part["benchmarks"]:
            entry["name"] = re.sub(r"/iterations:\d+(/manual_time)?$", "", entry["name"])  # as Google Benchmark names a row
            if "error_occurred" not in entry or entry["name"] not in entries:
                entries[entry["name"]] = {"commit": part["context"].get("commit"), **entry}
    merged["benchmarks"] = list(entries.values())
    output.write_text(json.dumps(merged, indent=1) + "\n")
    print(f"{output}: {len(entries)} rows")
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, default, seconds in (("speed", "compare.json", 540.0), ("errors", "errors.json", 300.0)):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, default=Path(default))
        command.add_argument("--seconds", type=float, default=seconds)
        command.add_argument("--candidates", default=",".join(CANDIDATES), help=f"of {', '.join(CANDIDATES)}")
        command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        command.add_argument("--again", action="store_true", help="measure again what the output holds")
        if name == "speed":
            command.add_argument("--filter", default=".", help="regular expression over the rows' names")
            command.add_argument("--compile-jobs", type=int, default=max(1, (os.cpu_count() or 2) * 3 // 4))
        else:
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
    return speed(given) if given.command == "speed" else errors(given)


if __name__ == "__main__":
    raise SystemExit(main())
