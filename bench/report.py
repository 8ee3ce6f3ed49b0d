"""Writes the benchmark tables and plots of README.md and docs/benchmarks.md from bench/results/*.json.

Usage: python bench/report.py [--check]      --check changes nothing and fails if a page is not what the results say

A result file is what a benchmark program writes:

    {"title": "...", "machine": "...", "versions": "...", "date": "...", "commit": "...", "command": "...",
     "columns": ["case", "flashdelta ms", "transformers ms", "ratio"], "rows": [["...", 1.2, 3.4, 2.8]]}

The first column names the case; columns whose name ends in " ms" are drawn as bars. The README shows the file whose "readme" is
true; docs/benchmarks.md shows all. bench/results/h200.json is different: bench_gpu and compare.py write it in Google Benchmark's
format, and report_gpu.py makes its tables. Without it the pages keep what they say of the GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import report_gpu

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: written by bench/report.py -->", "<!-- end of benchmarks -->"
GPU_BEGIN, GPU_END = "<!-- GPU benchmarks: written by bench/report.py -->", "<!-- end of GPU benchmarks -->"
GPU_RESULT = "h200.json"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def table(result: dict[str, Any]) -> str:
    lines = [result["columns"], ["---"] + ["---:"] * (len(result["columns"]) - 1), *result["rows"]]
    return "\n".join("| " + " | ".join(cell(c) for c in line) + " |" for line in lines)


def section(path: Path, result: dict[str, Any], images: str) -> str:
    facts = "; ".join(f"{result[k]}" for k in ("machine", "versions", "date") if result.get(k))
    made = f"Made by `{result['command']}` at commit {result['commit']}. {facts}."
    return f"**{result['title']}**\n\n{table(result)}\n\n![{result['title']}]({images}/{path.stem}.svg)\n\n{made}"


def plot(path: Path, result: dict[str, Any], folder: Path) -> None:
    """One group of bars per case, on a logarithmic axis: the cases differ by orders of magnitude."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flashdelta"  # the same picture from the same numbers
    from matplotlib import pyplot

    columns = [i for i, name in enumerate(result["columns"]) if name.endswith(" ms")]
    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.32 * len(rows) * len(columns)))
    for n, column in enumerate(columns):
        place = [i + 0.8 * n / len(columns) for i in range(len(rows))]
        bars = axes.barh(place, [row[column] or 0 for row in rows], 0.8 / len(columns), label=result["columns"][column][:-3])
        axes.bar_label(bars, [cell(row[column]) for row in rows], padding=3, fontsize=8)
    axes.set_yticks([i + 0.4 - 0.4 / len(columns) for i in range(len(rows))], [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms, less is better")
    axes.margins(x=0.15)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / f"{path.stem}.svg", metadata={"Date": None})


def gpu_blocks(result: dict[str, Any], pictures: list[str]) -> dict[str, str]:
    """What README.md and docs/benchmarks.md say of the GPU."""
    short, long = report_gpu.tables(result)

    def block(tables: list[report_gpu.Table], images: str) -> str:
        parts = ["\n\n".join(x for x in (f"**{t['title']}**", table(t), t.get("note", "")) if x) for t in tables]
        parts += [f"![{report_gpu.PICTURES[picture]}]({images}/{picture})" for picture in pictures]
        return "\n\n".join([*parts, report_gpu.facts(result)])

    return {"README.md": block(short, "docs"), "docs/benchmarks.md": block(long, ".")}


def replaced(text: str, begin: str, end: str, body: str) -> str:
    """The text with what stands between the marks replaced."""
    if begin not in text or end not in text:
        raise SystemExit(f"report: a page lacks the marks {begin} and {end}")
    block = f"{begin}\n\n{body}\n\n{end}" if body else f"{begin}\n\n{end}"
    return re.sub(f"{begin}.*{end}", lambda _: block, text, flags=re.S)


def main(root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = {path: json.loads(path.read_text()) for path in sorted((root / "bench/results").glob("*.json"))}
    gpu = next((results.pop(path) for path in list(results) if path.name == GPU_RESULT), None)
    pictures = list(report_gpu.PICTURES)
    if gpu is None:
        print(f"report: bench/results/{GPU_RESULT} is not there: the pages keep what they say of the GPU")
    if not check:
        for path, result in results.items():
            plot(path, result, root / "docs")
        if gpu is not None:
            pictures = report_gpu.plot(gpu, root / "docs")
    pictures = [picture for picture in pictures if (root / "docs" / picture).exists()]
    stale = [f"docs/{path.stem}.svg" for path in results if not (root / "docs" / f"{path.stem}.svg").exists()]
    shown = {path: result for path, result in results.items() if result.get("readme")}
    of_gpu = None if gpu is None else gpu_blocks(gpu, pictures)
    for page, chosen, images in (("README.md", shown, "docs"), ("docs/benchmarks.md", results, ".")):
        text = (root / page).read_text()
        body = "\n\n".join(section(path, result, images) for path, result in chosen.items())
        written = replaced(text, BEGIN, END, body)
        if of_gpu is not None:
            written = replaced(written, GPU_BEGIN, GPU_END, of_gpu[page])
        if written == text:
            continue
        if check:
            stale.append(page)
        else:
            (root / page).write_text(written)
    if stale:
        print(f"report: not what bench/results says: {', '.join(stale)}; run bench/report.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
