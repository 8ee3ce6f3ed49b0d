"""Speed and memory of flashdelta on this machine's CPU, against transformers' PyTorch functions.

`run()` measures, `table()` and `plot()` show; `python -m flashdelta bench` and `bench/compare_torch.py` use them. Ours and
theirs take turns call by call, so that a machine that slows down slows both; each number is a median. A run during which
other programs took the processor is refused: one busy neighbour can make a 0.2 ms parallel region take 8 ms.

Shapes are those of Qwen3-Next: 16 query/key heads, 32 value heads, head dims 128, bf16. transformers' functions are called
without the decorators that would look for other packages. Their time depends on whether the allocator returns memory to the
system between calls, so a second process measures all again with a heap that is kept.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, step_

H, HV, K, V = 16, 32, 128, 128
TOKENS, LONG = 2048, 8192
REPEATS = 9
STATES = 128  # 256 MB of decode states: more than any cache holds
CHUNK = 32  # of the CPU backend
MATRIX = 2048  # of the fp32 matrix product that gives the rate to compare with
MAX_OTHERS = 0.1  # processors that other programs may keep busy
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc: never give memory back

#: FLOPs of one token and value head of our forward: three products with the state, two with the values of the chunk, and
#: Q K^T and K K^T shared by the value heads of a group.
FORWARD_FLOPS = 6 * K * V + 4 * CHUNK * V + 4 * CHUNK * K * H // HV


def number(x: float) -> str:
    """Three digits, whole numbers from 1,000 on."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


class Busy(RuntimeError):
    """The machine is too busy for a measurement to mean anything."""


class Quiet:
    """Measures how many processors other programs kept busy while the `with` block ran: `others`."""

    def __enter__(self) -> Quiet:
        self.start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed, busy, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        self.others = max(0.0, busy - own) / elapsed

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        idle = fields[3] + fields[4]
        ticks = sum(fields[:8]) - idle  # guest time is counted within user time
        times = os.times()
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(times[:4])

    def check(self) -> None:
        """Raises Busy where too few processors were left for the threads of torch."""
        left = (os.cpu_count() or 1) - self.others
        if left < torch.get_num_threads() - MAX_OTHERS:
            raise Busy(f"other programs kept {self.others:.2f} processors busy; {MAX_OTHERS} are allowed: try again")


def wait_until_quiet(seconds: float) -> None:
    """Returns once a second has passed in which the machine was quiet; raises Busy after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        with Quiet() as quiet:
            time.sleep(1)
        try:
            return quiet.check()
        except Busy:
            if time.monotonic() >= end:
                raise


def inputs(tokens: int, gradients: bool = False, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k [1, T, 16, 128] and v [1, T, 32, 128] in bf16, log gates and write strengths [1, T, 32] in fp32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = (normal(1, tokens, H, K).bfloat16() for _ in range(2))
    v = normal(1, tokens, HV, V).bfloat16()
    g = torch.nn.functional.logsigmoid(normal(1, tokens, HV)) / 16
    beta = normal(1, tokens, HV).sigmoid()
    return tuple(x.to(device).requires_grad_(gradients) for x in (q, k, v, g, beta))


def torch_functions() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """transformers' chunked and recurrent rule in plain PyTorch; None where transformers is not installed."""
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as modeling
    except ImportError:
        return None
    return inspect.unwrap(modeling.torch_chunk_gated_delta_rule), inspect.unwrap(modeling.torch_recurrent_gated_delta_rule)


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, progress: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of each function; they take turns, after one call each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
        progress()
    return {name: statistics.median(values) for name, values in times.items()}


def times(repeats: int = REPEATS, progress: Callable[[], Any] = lambda: None) -> dict[str, dict[str, float]]:
    """Milliseconds of {"forward", "training", "decode"} by {"ours", "theirs", ...}; counts 3 (repeats + 1) times."""
    theirs = torch_functions()
    plain, leaves = inputs(TOKENS), inputs(TOKENS, gradients=True)
    do = torch.randn(1, TOKENS, HV, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}

    def forward(rule: Callable[..., Any]) -> None:
        q, k, v, g, beta = plain
        rule(q, k, v, g=g, beta=beta, **options)

    def training(rule: Callable[..., Any]) -> None:
        q, k, v, g, beta = leaves
        rule(q, k, v, g=g, beta=beta, **options)[0].backward(do)
        for leaf in leaves:
            leaf.grad = None

    a, b = torch.ones(MATRIX, MATRIX), torch.ones(MATRIX, MATRIX)
    q, k, v, g, beta = (x[:, :1].contiguous() for x in plain)
    states = [torch.randn(1, HV, K, V) for _ in range(STATES)]

    def decode(rule: Callable[..., Any]) -> None:
        for i, state in enumerate(states):
            _, states[i] = rule(q, k, v, g=g, beta=beta, initial_state=state, **options)

    def decode_in_place() -> None:
        for state in states:
            step_(q, k, v, g, beta, state, qk_l2norm=True)

    cases: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {"ours": lambda: forward(chunk_gated_delta_rule), "gemm": lambda: torch.mm(a, b)},
        "training": {"ours": lambda: training(chunk_gated_delta_rule)},
        "decode": {"ours": lambda: decode(fused_recurrent_gated_delta_rule), "in place": decode_in_place},
    }
    if theirs is not None:
        chunk, recurrent = theirs
        cases["forward"]["theirs"] = lambda: forward(chunk)
        cases["training"]["theirs"] = lambda: training(chunk)
        cases["decode"]["theirs"] = lambda: decode(recurrent)
    result = {}
    for case, functions in cases.items():
        with torch.set_grad_enabled(case == "training"):
            result[case] = interleaved(functions, repeats, progress)
    result["decode"] = {name: ms / STATES for name, ms in result["decode"].items()}
    return result


def peak_memory(whose: str, operation: str, tokens: int) -> dict[str, float]:
    """Peak megabytes that one call adds to this process, and the megabytes of what it returns.

    Args:
        whose: "ours" or "theirs".
        operation: "forward" or "training" (forward and backward).
        tokens: length of the sequence.
    """
    functions = torch_functions()
    if whose == "theirs" and functions is None:
        raise RuntimeError("transformers is not installed")
    rule: Callable[..., Any] = functions[0] if whose == "theirs" and functions else chunk_gated_delta_rule
    gradients = operation == "training"

    def call(leaves: tuple[Tensor, ...], do: Tensor) -> list[Tensor]:
        q, k, v, g, beta = leaves
        with torch.set_grad_enabled(gradients):
            o, state = rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, output_final_state=True)
            if not gradients:
                return [o, state]
            o.backward(do)
        return [o.detach(), state.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    call(inputs(128, gradients), torch.ones(1, 128, HV, V).bfloat16())  # code and thread stacks are there before
    leaves, do = inputs(tokens, gradients), torch.ones(1, tokens, HV, V).bfloat16()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    results = call(leaves, do)
    return {
        "extra": (_status("VmHWM") - before) / 1e6,
        "results": sum(x.numel() * x.element_size() for x in results) / 1e6,
    }


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def _in_process(*arguments: str, **environment: str) -> Any:
    """What `python -m flashdelta.benchmark arguments` prints."""
    command = [sys.executable, "-m", "flashdelta.benchmark", "--threads", str(torch.get_num_threads()), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(repeats: int = REPEATS, wait: float = 60, memory: bool = True, bar: bool = True) -> dict[str, Any]:
    """Measures everything.

    Args:
        repeats: calls per median, at least 9 for a result that is kept.
        wait: seconds to wait for a quiet machine.
        memory: also peak memory at 8,192 tokens.
        bar: show a progress bar (needs tqdm).

    Returns:
        "times", "times_kept_heap" (see `times`), "memory" (megabytes by "ours forward", ...), "others" (processors that
        other programs used), "gemm_gflops", "share" (of that rate, by our forward) and "ratios".

    Raises:
        Busy: other programs used the machine before or while it was measured.
    """
    wait_until_quiet(wait)
    theirs = torch_functions() is not None
    steps = 3 * (repeats + 1) + 1 + (2 if memory else 0) * (2 if theirs else 1)
    progress: Callable[[], Any] = lambda: None  # noqa: E731
    if bar:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        progress = tqdm(total=steps, desc="measuring", leave=False).update
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "repeats": repeats}
    with Quiet() as quiet:
        result["times"] = times(repeats, progress)
        if theirs:
            result["times_kept_heap"] = _in_process("times", str(repeats), **KEPT_HEAP)
        progress()
    quiet.check()
    result["others"] = quiet.others
    if memory:
        result["memory"] = {}
        for whose in ("ours", "theirs") if theirs else ("ours",):
            for operation in ("forward", "training"):
                in_process = _in_process("memory", whose, operation, str(LONG))
                result["memory"][f"{whose} {operation}"] = in_process
                progress()
    measured = result["times"]
    result["gemm_gflops"] = 2 * MATRIX**3 / measured["forward"]["gemm"] / 1e6
    result["share"] = FORWARD_FLOPS * TOKENS * HV / measured["forward"]["ours"] / 1e6 / result["gemm_gflops"]
    if theirs:
        result["ratios"] = {case: values["theirs"] / values["ours"] for case, values in measured.items()}
    return result


def table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of times in a result of `run`."""
    names = {
        "forward": f"forward, {TOKENS:,} tokens",
        "training": f"forward and backward, {TOKENS:,} tokens",
        "decode": "decode, one token",
    }
    rows = []
    for case, name in names.items():
        ms, kept = result["times"][case], result.get("times_kept_heap", {}).get(case, {})
        theirs, kept_theirs = ms.get("theirs"), kept.get("theirs")
        rows.append(
            [name, ms["ours"], theirs, theirs and theirs / ms["ours"], kept_theirs, kept and kept_theirs / kept["ours"]]
        )
        if case == "decode":
            ours, kept_ours = ms["in place"], kept.get("in place")
            ratios = (theirs and theirs / ours, kept_ours and kept_theirs / kept_ours)
            rows.append(["decode, state in place", ours, theirs, ratios[0], kept_theirs, ratios[1]])
    columns = ["case", "flashdelta ms", "transformers ms", "ratio", "transformers, heap kept ms", "ratio, heap kept"]
    return columns, rows


def summary(result: dict[str, Any]) -> str:
    """The numbers of a result of `run` that are not in its table."""
    lines = [
        f"the forward runs at {result['share']:.0%} of the rate of torch.mm in fp32, {result['gemm_gflops']:.0f} GFLOP/s "
        f"with {result['threads']} threads ({FORWARD_FLOPS:,} FLOPs per token and value head)"
    ]
    for name, megabytes in result.get("memory", {}).items():
        extra, results = megabytes["extra"], megabytes["results"]
        lines.append(f"peak memory of {name}, {LONG:,} tokens: {extra:,.0f} MB, of which {results:,.0f} MB are results")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the table of a result of `run` as bars (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, rows = table(result)
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    for offset, column, label in ((-0.2, 2, "transformers (PyTorch)"), (0.2, 1, "flashdelta")):
        places = [i + offset for i in range(len(rows))]
        bars = axes.barh(places, [row[column] or 0 for row in rows], 0.4, label=label)
        axes.bar_label(bars, [number(row[column]) if row[column] else "" for row in rows], padding=3)
    axes.set(xscale="log", xlabel="ms, less is better", yticks=range(len(rows)), yticklabels=[row[0] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def machine() -> str:
    """The processor's name and the number of processors."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} processors"


def versions() -> str:
    """Versions of what was measured."""
    found = [f"flashdelta {__version__}", f"torch {torch.__version__}"]
    if torch_functions() is not None:
        import transformers

        found.append(f"transformers {transformers.__version__}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _main() -> None:
    parser = argparse.ArgumentParser(description="one measurement in a process of its own; prints JSON")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("what", choices=["times", "memory"])
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "times":
        print(json.dumps(times(int(given.arguments[0]))))
    else:
        whose, operation, tokens = given.arguments
        print(json.dumps(peak_memory(whose, operation, int(tokens))))


if __name__ == "__main__":
    _main()
