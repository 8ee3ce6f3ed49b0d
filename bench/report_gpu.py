"""What the report says of a GPU: tables and plots from the rows of bench_gpu and compare.py (Google Benchmark's format)."""

from __future__ import annotations

import math
import statistics
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
PUBLISHED_HEADS, PUBLISHED_TOKENS = ((16, 32), (8, 16), (4, 8), (2, 4)), (8192, 32768)  # of FlashQLA's backward benchmark
ALLOWED = 1.05  # times the best peer's error
TRAINED = {
    "float32": "PyTorch, float32",
    "noise": "PyTorch, float32, from weights rounded to bf16",
    "bfloat16": "PyTorch, bf16, the rule in float32",
    "flashdelta": "flashdelta, bf16",
}
SMOOTH = 20  # steps of a mean in the plot of losses
TIMES, LOSSES = "h200_tokens.svg", "h200_training.svg"
PICTURES = {TIMES: "time against tokens", LOSSES: "losses of 200 steps of training"}
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
    row = "backward/16/32/1x32768"
    candidates = {"flashdelta": "flashdelta", "flash_qla": "FlashQLA", "fla": "FLA"}
    lines = [[label, measured.counter(f"memory/{row}/{c}", "peak_MB")] for c, label in candidates.items()]
    lines = [line for line in lines if line[1] is not None]
    note = (
        "Peak of what PyTorch allocated beyond the inputs in one forward for training and its backward; the output, the final "
        "state and all gradients count."
    )
    title = "Memory of one layer's forward and backward, 32,768 tokens, 16/32 heads"
    return {"title": title, "columns": ["kernel", "peak MB"], "rows": lines, "note": note} if lines else None


def _both(measured: Measured) -> Table | None:
    """Forward for training and backward together."""
    lines: list[list[Any]] = []
    for row in row_list.rows():
        if row.operation == "training_forward":
            shape = row.name.removeprefix("training_forward/")
            ours = [measured.ours(f"{part}/{shape}") for part in ("training_forward", "backward")]
            peers = [measured.peers(f"{part}/{shape}") for part in ("training_forward", "backward")]
            sums = [peers[0][p] + peers[1][p] if p in peers[0] and p in peers[1] else None for p in ("flash_qla", "fla")]
            if None not in ours:
                total = sum(ms for ms in ours if ms is not None)
                best = min((ms for ms in sums if ms is not None), default=None)
                lines.append([shape, total, *sums, None if best is None else best / total])
    columns = ["heads, lengths", "flashdelta ms", "FlashQLA ms", "FLA ms", "ratio"]
    return {"title": "Forward for training and backward together", "columns": columns, "rows": lines} if lines else None


def _stress(measured: Measured) -> Table | None:
    lines: list[list[Any]] = []
    for operation in ("forward", "backward", "step"):
        entry = measured.entries.get(f"stress/cuda/{operation}")
        if entry is not None:
            lines.append([operation, *(entry[c] for c in ("iterations", "alone", "compared", "seed")), entry.get("commit")])
    columns = ["operation", "batches", "a sequence also alone", "compared with the CPU", "seed", "commit"]
    note = (
        "Random batches in a row (tests/stress), lengths 0 to 3,000, all types and options: each run twice with the same bits, "
        "nothing written outside the outputs, everything finite, no hang."
    )
    return {"title": "Stress", "columns": columns, "rows": lines, "note": note} if lines else None


def _runs(measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """The training runs of each path, one per seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, entry in measured.entries.items():
        if name.startswith("training/"):
            found.setdefault(name.split("/")[1], []).append(entry)
    return found


def _training(measured: Measured) -> Table | None:
    runs, lines = _runs(measured), list[list[Any]]()
    for path, label in TRAINED.items():
        for seed, entry in enumerate(runs.get(path, [])):
            last = statistics.mean(entry["loss"][-SMOOTH:])
            lines.append(
                [label, seed, f"{last:.3f}", f"{entry['held_out']:.3f}", f"{entry['apart']:.4f}", entry["real_time"] / 1e3]
            )
    columns = ["path", "seed", f"loss, last {SMOOTH} steps", "held out", "largest distance to float32", "step ms"]
    about = next(iter(runs.values()))[0]["model"] if runs else ""
    note = f"The model of `examples/train_lm.py` ({about}), losses in bits per byte; distances are those of means of {SMOOTH} steps."
    return {"title": "Training", "columns": columns, "rows": lines, "note": note} if lines else None


def _host(measured: Measured) -> Table | None:
    lines = []
    for name in ("forward/16/32/1x512", "forward/2/8/1x512"):
        times = [measured.counter(f"{name}/{c}", "host_us") for c in ("flashdelta", *PEERS)]
        if times[0] is not None:
            lines.append([name, measured.counter(name, "host_us"), *times])
    columns = ["row", "C call us", "flashdelta us", *(f"{p} us" for p in PEERS.values())]
    title = "Host time of one eager call"
    return {"title": title, "columns": columns, "rows": lines, "note": ""} if lines else None


def _host_pieces(measured: Measured) -> Table | None:
    lines = [
        [name.removeprefix("host/"), entry["real_time"], *(entry.get(c) for c in ("p10_us", "p90_us", "after_wait_us"))]
        for name, entry in measured.entries.items()
        if name.startswith("host/")
    ]
    note = (
        "`bench/host_time.py`: eager PyTorch calls with the device idle, their pieces, and the first call of a fresh process whose "
        "CUDA context exists; `add_` is PyTorch's addition in place. After wait: single calls right after the host waited for the device."
    )
    columns = ["call", "median us", "p10 us", "p90 us", "after wait us"]
    return {"title": "Host time of our calls", "columns": columns, "rows": lines, "note": note} if lines else None


def tables(result: dict[str, Any]) -> tuple[list[Table], list[Table]]:
    """The README's tables and those of docs/benchmarks.md."""
    measured = Measured(result)
    listed = row_list.rows()
    forward = [row for row in listed if row.operation == "forward"]
    backward = [row for row in listed if row.operation == "backward"]
    published = [row for row in backward if (row.H, row.HV) in PUBLISHED_HEADS and row.tokens in PUBLISHED_TOKENS]
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
        _table("Backward", measured, backward, _summary(measured, published, "The 32 rows of FlashQLA's benchmark")),
        _table("Forward for training", measured, [row for row in listed if row.operation == "training_forward"]),
        _both(measured),
        _errors(measured),
        _memory(measured),
        _training(measured),
        _stress(measured),
        _host(measured),
        _host_pieces(measured),
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
    """Writes the pictures of what was measured; the names of the files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flashdelta"  # the same picture from the same numbers
    measured = Measured(result)
    return [*_plot_times(measured, folder), *_plot_losses(measured, folder)]


def _plot_losses(measured: Measured, folder: Path) -> list[str]:
    """Losses of the training runs, smoothed, one picture per seed."""
    from matplotlib import pyplot

    runs = _runs(measured)
    if not runs:
        return []
    seeds = max(len(entries) for entries in runs.values())
    figure, all_axes = pyplot.subplots(1, seeds, figsize=(4 * seeds, 3.5), layout="constrained", squeeze=False, sharey=True)
    for path, label in TRAINED.items():
        for axes, entry in zip(all_axes[0], runs.get(path, []), strict=False):
            curve, width = entry["loss"], min(SMOOTH, len(entry["loss"]))
            smoothed = [statistics.mean(curve[i : i + width]) for i in range(len(curve) - width + 1)]
            axes.plot(range(width, len(curve) + 1), smoothed, linewidth=1, label=label)
    for seed, axes in enumerate(all_axes[0]):
        axes.set(xlabel="step", title=f"seed {seed}")
    all_axes[0][0].set_ylabel(f"bits per byte, mean of {SMOOTH} steps")
    all_axes[0][0].legend(fontsize=7)
    figure.savefig(folder / LOSSES, metadata={"Date": None})
    pyplot.close(figure)
    return [LOSSES]


def _plot_times(measured: Measured, folder: Path) -> list[str]:
    """Time against tokens of one sequence, a part of the picture per head configuration."""
    from matplotlib import pyplot

    single = {
        (row.H, row.HV, row.tokens): row.name
        for row in row_list.rows()
        if row.operation == "forward" and len(row.lengths) == 1
    }
    labels = {"flashdelta": "flashdelta", "flashdelta_whole": "flashdelta, sequence whole", **PEERS}
    alone = {"flashdelta": "", "flashdelta_whole": "/cp_off"}  # the C call's row, where PyTorch's was not timed

    def time(name: str, candidate: str) -> float | None:
        beside = measured.milliseconds(f"{name}/{candidate}")
        return measured.milliseconds(name + alone[candidate]) if beside is None and candidate in alone else beside

    figure, all_axes = pyplot.subplots(1, len(PLOT_HEADS), figsize=(4 * len(PLOT_HEADS), 3.5), layout="constrained")
    drawn = False
    for axes, (H, HV) in zip(all_axes, PLOT_HEADS, strict=True):
        for candidate, label in labels.items():
            times = {T: time(name, candidate) for (h, hv, T), name in single.items() if (h, hv) == (H, HV)}
            points = sorted((T, ms) for T, ms in times.items() if ms is not None)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
                drawn = True
        axes.set(xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="ms", title=f"{H}/{HV} heads")
    if drawn:
        max(all_axes, key=lambda axes: len(axes.lines)).legend(fontsize=7)
        figure.savefig(folder / TIMES, metadata={"Date": None})
    pyplot.close(figure)
    return [TIMES] if drawn else []
