"""Times what an eager PyTorch call costs the host: whole calls, their pieces, and the first call of a process.

Usage: python bench/host_time.py [--output host_time.json] [--device cuda|cpu] [--processes 3]

A sample is the mean of 10 calls one after another, with the device idle at the start and never far behind; the table has the
median, p10 and p90 of the samples, and the median of single calls right after the host waited for the device, whose caches
are cold. `add_` is PyTorch's own addition in place: what this host needs for the smallest call. The pieces of a known call:
its key (layouts of all tensors, and the look-up), the outputs' allocation, the packing of the arguments, the library's call;
`operator` is the long way through PyTorch's dispatcher. On a CPU the library's call contains the work itself.

The first call of a process is timed in fresh processes, after the context was created: until the host has it back, and until
its results are there. Its pieces are the plan, the first and the second call of the library.

The file has Google Benchmark's format; times are in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flashdelta
import rows as row_list
from candidates import Data, data
from flashdelta import _direct, _lib, _plan, ops
from result_file import Results, context

Call = Callable[[], Any]
CALLS = 10  # of a sample
SAMPLES = {"cuda": 60, "cpu": 2}
LENGTHS = {  # rows of bench/rows.txt: one kernel, ordered sequences, sequences cut into runs
    "cuda": ("forward/16/32/1x512", "forward/16/32/8x1024", "forward/2/8/1x8192"),
    "cpu": ("forward/2/8/1x512",),
}
FIRST_CALL = """
import json, sys, time
import torch
import flashdelta
from flashdelta import _lib, _plan
device, whole = sys.argv[1], sys.argv[2] == "whole"
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
q, k = (torch.randn(1, 512, 16, 128, device=device).bfloat16() for _ in "qk")
v = torch.randn(1, 512, 32, 128, device=device).bfloat16()
g, beta = -torch.rand(1, 512, 32, device=device), torch.rand(1, 512, 32, device=device)
o = torch.empty_like(v)
wait()
laps = {}
start = time.perf_counter()
def lap(name, begin):
    laps[name] = 1e6 * (time.perf_counter() - begin)
    return time.perf_counter()
if whole:
    with torch.no_grad():
        flashdelta.forward(q, k, v, g, beta, qk_l2norm=True)
    lap("returned", start)
    wait()
    lap("done", start)
else:
    plan = _plan.find(_lib.FORWARD, (q, k, v, g, beta), (0.0, True))
    args = plan.pack([t.data_ptr() for t in (q, k, v, g, beta, o)] + [0] * 3)
    then = lap("plan", start)
    _lib.check(_plan.enqueue(plan, q, args))
    then = lap("first library call", then)
    _lib.check(_plan.enqueue(plan, q, args))
    then = lap("second library call", then)
    wait()
    lap("wait", then)
print(json.dumps(laps))
"""


def quantile(samples: list[float], q: float) -> float:
    return sorted(samples)[round(q * (len(samples) - 1))]


class Clock:
    """Measures calls, writes rows."""

    def __init__(self, device: str, results: Results) -> None:
        self.device, self.results = device, results

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, name: str, call: Call) -> None:
        """Times a call and prints its row."""
        for _ in range(3):
            call()
        samples, singles = [], []
        for _ in range(SAMPLES[self.device]):
            self.wait()
            start = time.perf_counter()
            call()
            singles.append(1e6 * (time.perf_counter() - start))
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            samples.append(1e6 * (time.perf_counter() - start) / CALLS)
        self.wait()
        self.add(name, samples, after_wait_us=statistics.median(singles))

    def add(self, name: str, samples: list[float], **counters: float) -> None:
        median, p10, p90 = (quantile(samples, q) for q in (0.5, 0.1, 0.9))
        self.results.add(name, len(samples), median, median, p10_us=p10, p90_us=p90, **counters)
        self.results.save()
        single = "".join(f"{value:11.1f}" for value in counters.values())
        print(f"{name:48}{median:11.1f}{p10:11.1f}{p90:11.1f}{single}", flush=True)


def pieces_of_a_forward(clock: Clock, d: Data) -> None:
    """The parts of `flashdelta.forward` on a plain batch, no states: what `_direct.call` does, one after another."""
    inputs = (d.q, d.k, d.v, d.g, d.beta, None, None, None, None, None)
    asked = ("forward", False, None, *(False,) * 4, "auto", 1e-6, None, "auto", None)
    plan = _plan.find(_lib.FORWARD, inputs, ())
    o = torch.empty_like(d.v)
    values = [t.data_ptr() for t in (*inputs[:5], o)] + [0] * 3
    args = plan.pack(values)
    size = plan.workspace
    workspace = d.q.new_empty(size + 256, dtype=torch.uint8)
    where = -(-workspace.data_ptr() // 256) * 256
    stream = torch.cuda.current_stream().cuda_stream if clock.device == "cuda" else None
    known = _direct._known
    if known.get(_direct._key(asked, inputs)) is None:
        raise RuntimeError("the key of a call that went before is not known")
    clock.measure("host/forward/1x512/key", lambda: known.get(_direct._key(asked, inputs)))
    clock.measure("host/forward/1x512/allocation", lambda: torch.empty_like(d.v, memory_format=torch.contiguous_format))
    clock.measure("host/forward/1x512/pack", lambda: plan.pack([t.data_ptr() for t in (*inputs[:5], o)] + [0] * 3))
    clock.measure("host/forward/1x512/library", lambda: plan.run(args, where, size, stream))
    clock.measure("host/forward/1x512/operator", lambda: ops.forward(*inputs))


def calls(clock: Clock, device: str) -> None:
    """Rows of forward, step, forward and backward."""
    x = torch.zeros(8, device=device)
    clock.measure("host/add_", lambda: x.add_(1))
    listed = {row.name: row for row in row_list.rows()}
    made = {name: data(listed[name], device) for name in LENGTHS[device]}
    first = next(iter(made.values()))
    main = (first.q, first.k, first.v, first.g, first.beta)
    with torch.no_grad():
        clock.measure("host/forward/1x512", lambda: flashdelta.forward(*main))
        pieces_of_a_forward(clock, first)
        for name, d in made.items():
            states = {"initial_state": d.initial_state, "output_final_state": True, "cu_seqlens": d.cu_seqlens}
            tensors = (d.q, d.k, d.v, d.g, d.beta)
            clock.measure(f"host/{name}/states", lambda: flashdelta.forward(*tensors, **states))  # noqa: B023
        token = tuple(t[0, :8].unsqueeze(1).contiguous() for t in main)
        pool = torch.zeros(8, *first.initial_state.shape[1:], device=device)
        clock.measure("host/step_/8x1", lambda: flashdelta.step_(*token, pool))
        states = (pool, None, torch.empty_like(token[2]), pool)
        plan = _plan.find(_lib.STEP, (*token, None, None, None, pool, None, None, pool), ())
        args = plan.pack([t.data_ptr() for t in (*token, *states) if t is not None])
        clock.measure("host/step_/8x1/library", lambda: _plan.enqueue(plan, token[0], args))
    leaves = tuple(t.clone().requires_grad_() for t in main)
    clock.measure("host/training/1x512/forward", lambda: flashdelta.forward(*leaves))

    def train() -> None:
        torch.autograd.grad(flashdelta.forward(*leaves)[0], leaves, first.do)

    clock.measure("host/training/1x512/forward and backward", train)
    saved = ops.forward_train(*main)[2]
    wanted = [True] * 5 + [False] * 3
    clock.measure("host/training/1x512/backward alone", lambda: ops.backward(first.do, None, saved, wanted, *main))


def first_calls(clock: Clock, device: str, processes: int) -> None:
    """The first call, each in a process of its own."""
    found: dict[str, list[float]] = {}
    for i in range(processes + 1):
        kind = "whole" if i < processes else "pieces"
        command = [sys.executable, "-c", FIRST_CALL, device, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"a first call failed: {done.stderr[-2000:]}")
        for name, microseconds in json.loads(done.stdout).items():
            found.setdefault(f"host/first call/{name if kind == 'whole' else f'pieces/{name}'}", []).append(microseconds)
    for name, samples in found.items():
        clock.add(name, samples)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("host_time.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes for the first call; 0: none")
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        torch.set_num_threads(1)  # threads that wait for busy cores are no host time
    results = Results(given.output, context("bench/host_time.py", {}, {}), again=True)
    results.context["flashdelta"] = flashdelta.__version__
    clock = Clock(given.device, results)
    print(f"{'microseconds of the host':48}{'median':>11}{'p10':>11}{'p90':>11}{'after wait':>11}")
    calls(clock, given.device)
    if given.processes > 0:
        first_calls(clock, given.device, given.processes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
