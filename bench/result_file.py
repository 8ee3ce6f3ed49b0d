"""Result files in Google Benchmark's format: kept complete on disk while a program measures, merged afterwards."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit of the library: what FLASHDELTA_COMMIT says of one that was built elsewhere, else that of the checkout."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    given = os.environ.get("FLASHDELTA_COMMIT")
    return given or subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def context(program: str, found: dict[str, Any], missing: dict[str, str]) -> dict[str, Any]:
    """What Google Benchmark says of a run, and what it cannot know: the GPU, the candidates' versions, the command."""
    cuda = torch.cuda.is_available()
    driver = ""
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: candidate.version for name, candidate in found.items()}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "host_name": platform.node(),
        "executable": program,
        "num_cpus": os.cpu_count(),
        "library_build_type": "release",
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "driver": driver,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(["python", program, *sys.argv[1:]]),
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

    def add_failure(self, name: str, problem: Exception) -> None:
        entry = {"name": name, "run_name": name, "run_type": "iteration", "error_occurred": True}
        self.benchmarks[name] = entry | {"error_message": f"{type(problem).__name__}: {problem}"[:300]}

    def save(self) -> None:
        text = json.dumps({"context": self.context, "benchmarks": list(self.benchmarks.values())}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(self.path)


def merge(output: Path, inputs: list[Path]) -> int:
    """One file of several of the same GPU: rows of the later ones win, what they say of their runs is kept by name."""
    merged: dict[str, Any] = {"context": {}, "benchmarks": []}
    entries: dict[str, Any] = {}
    status = 0
    for path in inputs:
        try:
            part = json.loads(path.read_text())
        except json.JSONDecodeError:
            print(f"{path} is cut short: left out", file=sys.stderr)
            status = 1
            continue
        gpu = part["context"].get("gpu")
        known = merged["context"].get("gpu")
        if gpu is not None and known is not None and gpu != known:
            print(f"{path} is of {gpu}, others are of {known}", file=sys.stderr)
            return 1
        commands = [*merged["context"].get("commands", []), *part["context"].pop("commands", [])]
        command = part["context"].pop("command", None)
        merged["context"] |= part["context"]
        merged["context"]["commands"] = list(dict.fromkeys([*commands, *([command] if command else [])]))
        for entry in part["benchmarks"]:
            entry["name"] = re.sub(r"/iterations:\d+(/manual_time)?$", "", entry["name"])  # as Google Benchmark names a row
            if "error_occurred" not in entry or entry["name"] not in entries:
                entries[entry["name"]] = {"commit": part["context"].get("commit"), **entry}
    merged["benchmarks"] = list(entries.values())
    output.write_text(json.dumps(merged, indent=1) + "\n")
    print(f"{output}: {len(entries)} rows")
    return status


def progress(*arguments: Any, **options: Any) -> Any:
    """A progress bar; none in a log."""
    return tqdm(*arguments, disable=None, **options)


class Deadline:
    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)
