"""Measures flashdelta on this CPU against transformers' PyTorch functions and writes bench/results/cpu.json.

Usage: python bench/compare_torch.py [--repeats 9] [--wait 60] [--output bench/results/cpu.json]

It refuses a busy machine (exit status 2). `python bench/report.py` then writes the tables and plots of the documentation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from flashdelta import benchmark

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit that is checked out; "+" where tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    sources = ("src", "include", "python", "cmake", "CMakeLists.txt")
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", *sources) else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=benchmark.REPEATS, help="calls per median (default 9)")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for a quiet machine (default 60)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/cpu.json")
    arguments = parser.parse_args()
    if benchmark.torch_functions() is None:
        print("compare_torch: transformers is not installed", file=sys.stderr)
        return 2
    try:
        measured = benchmark.run(arguments.repeats, arguments.wait)
    except benchmark.Busy as busy:
        print(f"compare_torch: {busy}", file=sys.stderr)
        return 2
    columns, rows = benchmark.table(measured)
    result = {
        "title": f"CPU, bf16, {benchmark.H}/{benchmark.HV} heads of {benchmark.K}, {measured['threads']} threads",
        "machine": benchmark.machine(),
        "versions": benchmark.versions(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": "python bench/compare_torch.py",
        "readme": True,
        "columns": columns,
        "rows": rows,
        "measured": measured,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in [columns, *rows]:
        print("  ".join(f"{x:>15.4g}" if isinstance(x, float) else f"{x:>15}" for x in row))
    print(benchmark.summary(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
