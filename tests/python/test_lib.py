"""The ctypes mirror says what a C compiler says of the header; one OpenMP runtime; the list of backends."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flashdelta import _lib, _plan

HEADER = Path(__file__).parents[2] / "include" / "flashdelta" / "flashdelta.h"
STRUCTS = {
    "fd_tensor": _lib.Tensor,
    "fd_index": _lib.Index,
    "fd_problem": _lib.Problem,
    "fd_forward_args": _lib.ForwardArgs,
    "fd_backward_args": _lib.BackwardArgs,
    "fd_step_args": _lib.StepArgs,
    "fd_backend_description": _lib.BackendDescription,
}
ENUMS = {
    "FD_OK": _lib.OK,
    "FD_INVALID": _lib.INVALID,
    "FD_UNSUPPORTED": _lib.UNSUPPORTED,
    "FD_DEVICE_ERROR": _lib.DEVICE_ERROR,
    "FD_OUT_OF_MEMORY": _lib.OUT_OF_MEMORY,
    "FD_CPU": _lib.CPU,
    "FD_CUDA": _lib.CUDA,
    "FD_GATE_NONE": _lib.GATE_NONE,
    "FD_GATE_LOG": _lib.GATE_LOG,
    "FD_GATE_RAW": _lib.GATE_RAW,
    "FD_GATE_LOG_PER_KEY": _lib.GATE_LOG_PER_KEY,
    "FD_BETA_ONE": _lib.BETA_ONE,
    "FD_BETA_VALUE": _lib.BETA_VALUE,
    "FD_BETA_LOGIT": _lib.BETA_LOGIT,
    "FD_CONTEXT_AUTO": _lib.CONTEXT_AUTO,
    "FD_CONTEXT_ON": _lib.CONTEXT_ON,
    "FD_CONTEXT_OFF": _lib.CONTEXT_OFF,
    **{f"FD_{str(dtype)[6:].upper()}": number for dtype, number in _lib.DTYPES.items()},
    **{f"FD_{str(dtype)[6:].upper().replace('INT', 'INT')}": number for dtype, number in _lib.INDEX_DTYPES.items()},
    **{f"FD_BACKEND_{name.upper()}": number for name, number in _lib.BACKENDS.items()},
}


def test_structs_and_enumerators_equal_the_header(tmp_path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = ["#include <stdio.h>", '#include "flashdelta/flashdelta.h"', "int main(void) {"]
    for name, mirror in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field in mirror._fields_:
            lines.append(f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));')
    lines += [f'printf("{name} %d\\n", (int){name});' for name in ENUMS]
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run([compiler, "-std=c99", f"-I{HEADER.parents[1]}", str(source), "-o", str(program)], check=True)
    out = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    expected = {name: int(value) for name, value in (line.split() for line in out.splitlines())}
    got = dict(ENUMS)
    for name, mirror in STRUCTS.items():
        got[name] = ctypes.sizeof(mirror)
        got |= {f"{name}.{field[0]}": getattr(mirror, field[0]).offset for field in mirror._fields_}
    assert got == expected


def test_every_struct_member_of_the_header_is_mirrored() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    for name, mirror in STRUCTS.items():
        found = re.search(rf"typedef struct {name} {{(.*?)}} {name};", text, flags=re.S)
        assert found is not None
        members = re.findall(r"(\w+)(?:\[\d\])?;", found[1])
        assert members == [field[0] for field in mirror._fields_]


def test_a_plan_packs_the_struct_of_its_tensors() -> None:
    q, v = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 2, 16)[..., 8:]
    pool, index = torch.zeros(3, 2, 8, 8), torch.tensor([2])
    tensors = (q, q, v, None, None, None, None, None, pool, index, None, pool, index)
    plan = _plan.find(_lib.STEP, tensors, ())
    names = [_lib.STEP.members[i][0] for i in plan.slots]
    assert names == ["q", "k", "v", "initial_state", "initial_index", "o", "final_state", "final_index"]
    args = _lib.StepArgs.from_buffer_copy(plan.pack(range(1, 9)))
    assert args.size == ctypes.sizeof(args)
    assert args.problem == ctypes.addressof(plan.problem)
    assert [getattr(args, name).data for name in names] == list(range(1, 9))
    assert list(args.v.stride) == [128, 32, 16, 1]
    assert list(args.final_state.stride) == [128, 64, 8, 1]
    assert list(args.final_index.stride) == [1, 0]
    absent = set(_lib.STEP.members) - {_lib.STEP.members[i] for i in plan.slots}
    assert all(not getattr(getattr(args, name), "data", getattr(args, name)) for name, _ in absent)


def test_one_openmp_runtime() -> None:
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = {path for path in paths if re.search(r"lib(gomp|omp|iomp5)[.-]", path)}
    assert len(runtimes) == 1, runtimes


def test_backends_are_listed_with_a_reason_or_what_they_run_on() -> None:
    entries = {entry.name: entry for entry in _lib.backends()}
    assert entries["cpu"].available
    assert entries["reference"].available
    assert all(entry.detail for entry in entries.values())
    assert set(entries) <= set(_lib.BACKENDS)
