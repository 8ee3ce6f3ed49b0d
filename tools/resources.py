"""Registers, shared memory and spills of every CUDA kernel, from the build's `ptxas -v` output, against a committed table.

Usage: python tools/resources.py LOG [--update]

Fails on any spill, on ptxas's notes that it serialises wgmma (C7510 and its kin), and on any difference from
tools/resources.json, which --update writes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_name("resources.json")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SLOW = re.compile(r".*\(C75\d\d\).*|.*[Pp]otential [Pp]erformance [Ll]oss.*")


def plain(name: str) -> str:
    """A mangled name with its anonymous namespaces, which carry a hash of their file's path, as other compilers mangle them."""
    while match := re.search(r"(\d+)(_GLOBAL__N__)", name):
        name = name[: match.start()] + "12_GLOBAL__N_1" + name[match.start(2) + int(match[1]) :]
    return name


def parse(log: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Kernel and architecture -> registers, static shared memory, stack and spill bytes; and ptxas's notes of slow code."""
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in log.splitlines():
        if match := ENTRY.search(line):
            name = plain(match[1])
            current = kernels.setdefault(f"{name} {match[2]}", {"registers": 0, "shared": 0, "stack": 0, "spill": 0})
        elif match := SPILLS.search(line):
            current["stack"], current["spill"] = int(match[1]), int(match[2]) + int(match[3])
        elif match := USED.search(line):
            current["registers"] = int(match[1])
            current["shared"] = int(shared[1]) if (shared := SHARED.search(line)) else 0
    return kernels, [line.strip() for line in log.splitlines() if SLOW.match(line)]


def problems(kernels: dict[str, dict[str, int]], notes: list[str], table: dict[str, dict[str, int]]) -> list[str]:
    """What is wrong, one line each; none: all is well."""
    found = list(notes)
    found += [f"{name}: {k['spill']} bytes spilled" for name, k in kernels.items() if k["spill"]]
    found += [f"{name}: in the table, but not compiled" for name in table.keys() - kernels.keys()]
    for name, k in kernels.items():
        if name not in table:
            found.append(f"{name}: not in the table")
        elif k != table[name]:
            found.append(f"{name}: {k}, the table has {table[name]}")
    return found


def demangled(name: str) -> str:
    """For people; the mangled name where there is no c++filt."""
    try:
        text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return name
    return re.sub(r"\(.*", "", text.replace("(anonymous namespace)", "{}")).replace("void ", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="output of a build with -Xptxas=-v")
    parser.add_argument("--update", action="store_true", help="write tools/resources.json instead of comparing with it")
    args = parser.parse_args()
    kernels, notes = parse(args.log.read_text())
    if not kernels:
        print(f"resources: no kernel in {args.log}")
        return 1
    print(f"{'kernel':80s} {'arch':8s} {'registers':>9s} {'shared':>7s} {'stack':>6s} {'spill':>6s}")
    for key, k in sorted(kernels.items()):
        name, arch = key.split()
        print(f"{demangled(name)[:80]:80s} {arch:8s} {k['registers']:9d} {k['shared']:7d} {k['stack']:6d} {k['spill']:6d}")
    if args.update:
        TABLE.write_text(json.dumps(kernels, indent=1, sort_keys=True) + "\n")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    found = problems(kernels, notes, table)
    for line in found:
        print(f"resources: {line}")
    print(f"resources: {len(kernels)} kernels, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
