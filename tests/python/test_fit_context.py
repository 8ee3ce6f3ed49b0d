"""bench/fit_context.py: the constants that made the times come out again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fit_context

CONSTANTS = {
    "HALF_CHUNK": 2500.0,
    "FULL_CHUNK": 4000.0,
    "RUN": 8000.0,
    "HEAD": 30000.0,
    "PRE_PASS": 20000.0,
} | fit_context.PROFILED


def entry(name: str, cycles: float, **counters: float) -> dict[str, Any]:
    return {"name": f"{name}/iterations:40/manual_time", "median_us": cycles / 1800, "sm_MHz": 1800.0, **counters}


def total(counts: dict[str, float]) -> float:
    return sum(CONSTANTS[constant] * count for constant, count in counts.items())


def test_constants_come_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = []
    for name, chunks, items, blocks in (
        ("forward/2/8/1x512", 8, 16, 2),
        ("forward/2/8/1x8192", 128, 16, 2),
        ("forward/2/8/1x32768", 512, 16, 2),
        ("forward/16/64/4x8192", 128, 256, 1),
        ("forward/16/64/8x1024", 16, 512, 1),
    ):
        entries.append(entry(f"{name}/cp_off", total(fit_context.forward_counts(chunks, items, blocks))))
    for heads, tokens, runs, exact in (
        (8, 8192, 13, 2),
        (8, 32768, 16, 2),
        (8, 32768, 16, 8),
        (16, 32768, 8, 4),
        (16, 32768, 8, 0),
    ):
        chunks = tokens // 64
        counters = {
            "runs": runs,
            "pre_runs": runs - 1,
            "pre_chunks": chunks - chunks // runs,
            "exact_heads": exact,
            "value_blocks": 1,
        }
        cycles = total(fit_context.forward_counts(chunks / runs, runs * heads, 1)) + total(
            fit_context.pre_pass_counts(heads, counters)
        )
        suffix = "/flat" if exact == heads else "/decay" if exact == 0 else ""
        entries.append(entry(f"forward/{heads // 4}/{heads}/1x{tokens}{suffix}", cycles, **counters))
    whole = next(e for e in entries if e["name"].startswith("forward/16/64/4x8192"))
    asked = {"runs": 4, "pre_runs": 0, "workspace_MB": 400}
    entries.append(entry("forward/16/64/4x8192", whole["median_us"] * 1800 + 9000, **asked))
    found = tmp_path / "bench.json"
    found.write_text(json.dumps({"benchmarks": entries}))
    monkeypatch.setattr(sys, "argv", ["fit_context.py", str(found)])
    fit_context.main()
    said = capsys.readouterr().out
    for constant, value in (CONSTANTS | {"EMPTY": 9000.0}).items():
        line = next(line for line in said.splitlines() if f" {constant} = " in line)
        assert float(line.split(" = ")[1].split(";")[0]) == pytest.approx(value, rel=0.01), line
