"""Writes the benchmark tables and plots of README.md and docs/benchmarks.md from bench/results/*.json.

Usage: python bench/report.py [--check]      --check changes nothing and fails if a page is not what the results say

A result file is what a benchmark program writes:

    {"title": "...", "machine": "...", "versions": "...", "date": "...", "commit": "...", "command": "...",
     "columns": ["case", "flashdelta ms", "transformers ms", "ratio"], "rows": [["...", 1.2, 3.4, 2.8]]}

The first column names the case; columns whose name ends in " ms" are drawn as bars. The README shows the file whose "readme" is
true; docs/benchmarks.md shows all.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: written by bench/report.py -->", "<!-- end of benchmarks -->"


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


def plot(path: Path, result: dict[str, Any]) -> None:
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
    figure.savefig(ROOT / "docs" / f"{path.stem}.svg", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = {path: json.loads(path.read_text()) for path in sorted((ROOT / "bench/results").glob("*.json"))}
    if not check:
        for path, result in results.items():
            plot(path, result)
    stale = [f"docs/{path.stem}.svg" for path in results if not (ROOT / "docs" / f"{path.stem}.svg").exists()]
    shown = {path: result for path, result in results.items() if result.get("readme")}
    for page, chosen, images in (("README.md", shown, "docs"), ("docs/benchmarks.md", results, ".")):
        text = (ROOT / page).read_text()
        body = "\n\n".join(section(path, result, images) for path, result in chosen.items())
        block = f"{BEGIN}\n\n{body}\n\n{END}" if body else f"{BEGIN}\n\n{END}"
        written = re.sub(f"{BEGIN}.*{END}", lambda _, block=block: block, text, flags=re.S)
        if written == text:
            continue
        if check:
            stale.append(page)
        else:
            (ROOT / page).write_text(written)
    if stale:
        print(f"report: not what bench/results says: {', '.join(stale)}; run bench/report.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
