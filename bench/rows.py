"""The rows of bench/rows.txt; bench/rows.hpp is its counterpart for C++ and says how much work a row needs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("rows.txt")


class Row(NamedTuple):
    """One row; see bench/rows.txt for the names."""

    name: str
    operation: str  #: "forward", "training_forward", "backward", "step"
    H: int
    HV: int
    lengths: tuple[int, ...]  #: tokens of each sequence
    state_type: str  #: of a step: "float32" or "bfloat16"
    layout: str  #: of a step: "k_first" or "v_first"
    must_ms: float | None
    aim_ms: float | None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def parse_lengths(text: str) -> tuple[int, ...]:
    """(28672, 4096) for "28672+4096", (8192, 8192) for "2x8192"."""
    lengths: list[int] = []
    for term in text.split("+"):
        count, length = term.split("x") if "x" in term else ("1", term)
        lengths += [int(length)] * int(count)
    return tuple(lengths)


def parse(text: str) -> list[Row]:
    """Every row of a text in the format of rows.txt."""
    found: list[Row] = []
    mixes: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, must, aim = line.split()
        if must == "=":
            mixes[name] = aim
            continue
        operation, H, HV, lengths, *step = name.split("/")
        state_type, layout = step or ("float32", "k_first")
        goals = [None if goal == "-" else float(goal) for goal in (must, aim)]
        parsed = parse_lengths(mixes.get(lengths, lengths))
        found.append(Row(name, operation, int(H), int(HV), parsed, state_type, layout, *goals))
    return found


def rows() -> list[Row]:
    """All rows, most important first."""
    return parse(FILE.read_text())
