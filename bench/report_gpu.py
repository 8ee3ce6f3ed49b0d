"""What the report says of a GPU: tables and plots from the rows of bench_gpu and compare.py (Google Benchmark's format)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import rows as row_list
from rows import Row

PEERS = {"flash_qla": "FlashQLA", "flashinfer": "FlashInfer", "fla": "FLA"}
GRID_HEADS = ("16/16", "32/32", "16/32", "16/48", "8/24", "16/64", "8/32", "4/16", "2/8")
GRID_LENGTHS = (
    *("1x32768", "1x16384", "1x8192", "1x4096", "1x2048", "28672+4096", "2x16384", "4096+28672", "6144+2048", "1024+7168"),
    *("4x8192", "8x4096", "4x2048", "8x1024"),
)
ALLOWED = 1.05  # times the best peer's error
PLOT_HEADS = ((2, 8), (16, 32), (16, 64))
Table = dict[str, Any]  # title, columns, rows, and optionally note: what bench/report.py prints


class Measured:
    """The rows of a result file by name; failed ones count as absent."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.context = result["context"]
        self.entries = {e["name"]: e for e in result["benchmarks"] if not e.get("error_occurred")}

    def milliseconds(self, name: str) -> float | None:
        """Median: bench_gpu says it in a counter, compare.py as the time itself."""
        entry = self.entries.get(name)
        return None if entry is None else entry.get("median_us", entry["real_time"]) / 1e3

    def ours(self, name: str) -> float | None:
        """Through PyTorch, timed in turns with the peers; else the C call's graph."""
        beside = self.milliseconds(f"{name}/flashdelta")
        return self.milliseconds(name) if beside is None else beside

    def peers(self, name: str) -> dict[str, float]:
        found = {peer: self.milliseconds(f"{name}/{peer}") for peer in PEERS}
        return {peer: ms for peer, ms in found.items() if ms is not None}

    def counter(self, name: str, counter: str) -> float | None:
        return self.entries.get(name, {}).get(counter)

    def ratio(self, name: str) -> float | None:
        """Time of the fastest peer over ours."""
        ours, peers = self.ours(name), self.peers(name)
        return min(peers.values()) / ours if ours and peers else None


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(x) for x in values) / len(values))


def _goal(row: Row, ours: float | None) -> str | None:
    if row.must_ms is None or row.aim_ms is None or ours is None:
        return None
    reached = "aim reached" if ours <= row.aim_ms else "must reached" if ours <= row.must_ms else "missed"
    return f"{row.must_ms:g} / {row.aim_ms:g}, {reached}"


def _row(measured: Measured, row: Row) -> list[Any]:
    peers = measured.peers(row.name)
    share = measured.counter(row.name, "percent_of_floor")
    return [
        "/".join(row.name.split("/")[1:]),
        measured.ours(row.name),
        *(peers.get(peer) for peer in PEERS),
        measured.ratio(row.name),
        _goal(row, measured.ours(row.name)),
        None if share is None else f"{share:.0f} %",
        measured.counter(row.name, "sm_MHz"),
    ]


COLUMNS = [
    "heads, lengths",
    "flashdelta ms",
    *(f"{p} ms" for p in PEERS.values()),
    "ratio",
    "must / aim ms",
    "of floor",
    "SM MHz",
]


def _summary(measured: Measured, chosen: list[Row], kind: str) -> str:
    ratios = {row.name: ratio for row in chosen if (ratio := measured.ratio(row.name)) is not None}
    if not ratios:
        return "No peer was measured in these rows."
    slower = [name for name, ratio in ratios.items() if ratio < 1]
    lost = f"; slower than the fastest peer: {', '.join(slower)}" if slower else ""
    return (
        f"{kind}: {len(ratios)} of {len(chosen)} rows have a peer's time, {len(ratios) - len(slower)} are faster than every peer; "
        f"geometric mean of the ratio to the fastest peer {geometric_mean(list(ratios.values())):.2f}{lost}."
    )


def _table(title: str, measured: Measured, chosen: list[Row], note: str = "") -> Table | None:
    chosen = [row for row in chosen if measured.ours(row.name) is not None]
    if not chosen:
        return None
    return {"title": title, "columns": COLUMNS, "rows": [_row(measured, row) for row in chosen], "note": note}


def _steps(measured: Measured, chosen: list[Row]) -> Table | None:
    lines = []
    for row in chosen:
        ours = measured.ours(row.name)
        if ours is None:
            continue
        share = measured.counter(row.name, "percent_of_floor")
        peers = [None if ms is None else ms * 1e3 for ms in (measured.peers(row.name).get(p) for p in ("flashinfer", "fla"))]
        of_copy = None if share is None else f"{share:.0f} %"
        lines.append(
            ["/".join(row.name.split("/")[1:]), ours * 1e3, *peers, measured.counter(row.name, "GB_per_s"), of_copy]
        )
    columns = ["heads, sequences x tokens, states", "flashdelta us", "FlashInfer us", "FLA us", "GB/s", "of a copy"]
    note = "Bytes: the states, read once and written once; the rate of a copy was measured in the same run."
    return (
        {"title": "Decode step, states updated in place", "columns": columns, "rows": lines, "note": note} if lines else None
    )


def _modes(measured: Measured, chosen: list[Row]) -> Table | None:
    suffixes = ("", "/cp_off", "/cp_on", "/exact", "/cold", "/flat", "/flat/cp_off", "/decay", "/decay/cp_off")
    labels = ("planned", "whole", "split", "exact", "cold", "no decay", "no decay, whole", "all decay", "all decay, whole")
    lines = []
    for row in chosen:
        times = [measured.milliseconds(row.name + suffix) for suffix in suffixes]
        if any(ms is not None for ms in times[1:]):
            lines.append(["/".join(row.name.split("/")[1:]), *times])
    note = (
        "C calls. Planned: context parallelism as the planner chooses, a quarter of the heads without decay; whole, split: off and on "
        "by option; exact: without the gates' shortcut; cold: tensors rotated over more than 256 MB."
    )
    columns = ["heads, lengths", *(f"{label} ms" for label in labels)]
    return {"title": "Context parallelism", "columns": columns, "rows": lines, "note": note} if lines else None


def _errors(measured: Measured) -> Table | None:
    results = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
    cells: dict[str, dict[str, dict[str, float]]] = {}  # data -> kernel -> result
    for name, entry in measured.entries.items():
        if name.startswith("errors/"):
            _, kind, dtype, candidate = name.split("/")
            cells.setdefault(f"{kind}, {dtype}", {})[candidate] = {r: entry[r] for r in results if r in entry}
    lines: list[list[Any]] = []
    for data, kernels in sorted(cells.items()):
        for candidate, found in sorted(kernels.items()):
            line: list[Any] = [data, PEERS.get(candidate, candidate)]
            for result in results:
                best = min((kernels[p][result] for p in PEERS if result in kernels.get(p, {})), default=math.inf)
                worse = candidate not in PEERS and found.get(result, 0) > ALLOWED * best
                line.append(f"{found[result]:.2e}{' (above)' if worse else ''}" if result in found else None)
            lines.append(line)
    note = (
        "Worst relative L2 error per (sequence, value head) against the float64 recurrence, median over the seeds, 2/8 heads. "
        f"(above): more than {ALLOWED} times the best peer's."
    )
    columns = ["data", "kernel", *results]
    return {"title": "Errors", "columns": columns, "rows": lines, "note": note} if lines else None


def _memory(measured: Measured) -> Table | None:
    name = "backward/16/32/1x32768"
    candidates = {"flashdelta": "flashdelta", "flash_qla": "FlashQLA", "fla": "FLA"}
    lines = [[label, measured.counter(f"{name}/{c}", "peak_MB")] for c, label in candidates.items()]
    lines = [line for line in lines if line[1] is not None]
    note = "Peak of what PyTorch allocated beyond the inputs in one forward for training and its backward, results included."
    title = "Memory, 32,768 tokens, 16/32 heads"
    return {"title": title, "columns": ["kernel", "peak MB"], "rows": lines, "note": note} if lines else None


def _host(measured: Measured) -> Table | None:
    lines = []
    for name in ("forward/16/32/1x512", "forward/2/8/1x512"):
        times = [measured.counter(f"{name}/{c}", "host_us") for c in ("flashdelta", *PEERS)]
        if times[0] is not None:
            lines.append([name, measured.counter(name, "host_us"), *times])
    columns = ["row", "C call us", "flashdelta us", *(f"{p} us" for p in PEERS.values())]
    title = "Host time of one eager call"
    return {"title": title, "columns": columns, "rows": lines, "note": ""} if lines else None


def tables(result: dict[str, Any]) -> tuple[list[Table], list[Table]]:
    """The README's tables and those of docs/benchmarks.md."""
    measured = Measured(result)
    listed = row_list.rows()
    forward = [row for row in listed if row.operation == "forward"]
    backward = [row for row in listed if row.operation == "backward"]
    goals = [row for row in forward if row.must_ms is not None]
    others = [row for row in forward if row.must_ms is None]
    grid_names = {f"forward/{heads}/{lengths}" for heads in GRID_HEADS for lengths in GRID_LENGTHS}
    grid = [row for row in forward if row.name in grid_names]
    note = (
        "Medians of CUDA-graph replays, all candidates of a row in turns on the same tensors: bf16, K = V = 128, packed, fp32 gates "
        "and states, a quarter of the heads without decay. Ratio: the fastest peer's time over ours."
    )
    summary = _summary(measured, grid, "Nine head configurations, fourteen kinds of batches")
    first = _table("Forward, rows with a goal", measured, goals, f"{note}\n\n{summary}")
    found = [
        first,
        _table("Forward, all other rows", measured, others),
        _modes(measured, goals),
        _steps(measured, [row for row in listed if row.operation == "step"]),
        _table("Backward", measured, backward, _summary(measured, backward, "Backward")),
        _table("Forward for training", measured, [row for row in listed if row.operation == "training_forward"]),
        _errors(measured),
        _memory(measured),
        _host(measured),
    ]
    return [t for t in (first,) if t is not None], [t for t in found if t is not None]


def facts(result: dict[str, Any]) -> str:
    """Where and how the numbers were made."""
    c = result["context"]
    named = [("flashdelta", "flashdelta"), ("torch", "torch"), *PEERS.items()]
    versions = ", ".join(f"{label} {c[key]}" for key, label in named if key in c)
    ceilings = ""
    if "copy_GB_per_s" in c:
        ceilings = (
            f" Ceilings measured in the same run: a copy {float(c['copy_GB_per_s']):,.0f} GB/s, dense bf16 products "
            f"{float(c['products_TFLOP_per_s']):,.0f} TFLOP/s at {float(c['products_sm_MHz']):,.0f} MHz."
        )
    commands = "; ".join(f"`{command}`" for command in c.get("commands", [c.get("command", "")]))
    return f"{c.get('gpu', 'unknown GPU')}, driver {c.get('driver', '')}; {versions}; commit {c.get('commit')}; {c.get('date')}.{ceilings} Made by {commands}."


def plot(result: dict[str, Any], folder: Path) -> list[str]:
    """Time against tokens of one sequence, one picture per head configuration; the names of the files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flashdelta"  # the same picture from the same numbers
    from matplotlib import pyplot

    measured = Measured(result)
    single = {
        (row.H, row.HV, row.tokens): row.name
        for row in row_list.rows()
        if row.operation == "forward" and len(row.lengths) == 1
    }
    labels = {"flashdelta": "flashdelta", "flashdelta_whole": "flashdelta, sequence whole", **PEERS}
    figure, all_axes = pyplot.subplots(1, len(PLOT_HEADS), figsize=(4 * len(PLOT_HEADS), 3.5), layout="constrained")
    drawn = False
    for axes, (H, HV) in zip(all_axes, PLOT_HEADS, strict=True):
        for candidate, label in labels.items():
            times = {
                T: measured.milliseconds(f"{name}/{candidate}") for (h, hv, T), name in single.items() if (h, hv) == (H, HV)
            }
            points = sorted((T, ms) for T, ms in times.items() if ms is not None)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
                drawn = True
        axes.set(xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="ms", title=f"{H}/{HV} heads")
    if drawn:
        max(all_axes, key=lambda axes: len(axes.lines)).legend(fontsize=7)
        figure.savefig(folder / "h200_tokens.svg", metadata={"Date": None})
    pyplot.close(figure)
    return ["h200_tokens.svg"] if drawn else []
