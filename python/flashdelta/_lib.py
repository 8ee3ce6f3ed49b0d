"""The C library: where it lies, its structs, its status codes.

Everything here mirrors ``include/flashdelta/flashdelta.h``, the only binary contract; ``tests/python/test_lib.py`` compares
sizes, offsets and enumerators with what a C compiler says.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

# First: the library must find the OpenMP runtime that torch has loaded. Two runtimes in one process would start twice the
# threads.
import torch

OK, INVALID, UNSUPPORTED, DEVICE_ERROR, OUT_OF_MEMORY = range(5)
CPU, CUDA = range(2)
GATE_NONE, GATE_LOG, GATE_RAW, GATE_LOG_PER_KEY = range(4)
BETA_ONE, BETA_VALUE, BETA_LOGIT = range(3)
CONTEXT_AUTO, CONTEXT_ON, CONTEXT_OFF = range(3)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
INDEX_DTYPES = {torch.int64: 0, torch.int32: 1}
BACKENDS = {"auto": 0, "reference": 1, "cpu": 2, "cuda": 3, "sm90": 4}


class Tensor(ctypes.Structure):
    """fd_tensor."""

    _fields_ = (("data", c_void_p), ("stride", c_int64 * 4))


class Index(ctypes.Structure):
    """fd_index."""

    _fields_ = (("data", c_void_p), ("stride", c_int64 * 2))


def _members(ctype: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctype) for name in names.split())


class Problem(ctypes.Structure):
    """fd_problem."""

    _fields_ = (
        ("size", c_size_t),
        *_members(c_int64, "B T N H HV K V initial_rows final_rows checkpoint_rows"),
        *_members(c_int64, "initial_slots final_slots checkpoint_slots checkpoint_interval"),
        *_members(c_double, "scale l2norm_eps context_bound"),
        *_members(c_int32, "device backend dtype gate_dtype beta_dtype A_log_dtype dt_bias_dtype"),
        *_members(c_int32, "initial_dtype final_dtype checkpoint_dtype cu_seqlens_dtype index_dtype"),
        *_members(c_int32, "gate beta qk_l2norm allow_neg_eigval state_v_first context_parallel threads reserved"),
        ("workspace_limit", c_int64),
    )


_INPUTS = (
    ("size", c_size_t),
    ("problem", c_void_p),
    *_members(Tensor, "q k v g beta A_log dt_bias"),
    ("cu_seqlens", c_void_p),
    ("initial_state", Tensor),
    ("initial_index", Index),
)


class ForwardArgs(ctypes.Structure):
    """fd_forward_args."""

    _fields_ = (
        *_INPUTS,
        ("o", Tensor),
        ("final_state", Tensor),
        ("final_index", Index),
        ("checkpoints", Tensor),
        ("checkpoint_index", Index),
        ("saved", c_void_p),
        ("saved_bytes", c_size_t),
    )


class BackwardArgs(ctypes.Structure):
    """fd_backward_args."""

    _fields_ = (
        *_INPUTS,
        ("do_", Tensor),
        ("dfinal_state", Tensor),
        ("saved", c_void_p),
        ("saved_bytes", c_size_t),
        *_members(Tensor, "dq dk dv dg dbeta dA_log ddt_bias dinitial_state"),
    )


class StepArgs(ctypes.Structure):
    """fd_step_args."""

    _fields_ = (*_INPUTS, ("o", Tensor), ("final_state", Tensor), ("final_index", Index), ("accepted", c_void_p))


class BackendDescription(ctypes.Structure):
    """fd_backend_description."""

    _fields_ = (
        ("size", c_size_t),
        ("backend", c_int32),
        ("device", c_int32),
        ("available", c_int32),
        ("reserved", c_int32),
        ("name", c_char_p),
        ("detail", c_char_p),
    )


class Operation(NamedTuple):
    """How one of the three operations is called."""

    name: str
    args: type[ctypes.Structure]  #: its argument struct
    members: tuple[tuple[str, Any], ...]  #: of that struct, after ``size`` and ``problem``
    run: Any  #: the C function


def library_path() -> Path:
    """The shared library: what FLASHDELTA_LIBRARY names, else in the package (wheel), else in a checkout's build/release."""
    package = Path(__file__).resolve().parent
    name = "libflashdelta.so"
    if named := os.environ.get("FLASHDELTA_LIBRARY"):
        return Path(named)
    folders = (package, package.parents[1] / "build" / "release")
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ImportError(f"{name} is in none of {', '.join(map(str, folders))}: build it (`make`) or install the wheel")


def _load() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()))
    lib.fd_version.argtypes = ()
    lib.fd_version.restype = c_int32
    lib.fd_last_error.argtypes = ()
    lib.fd_last_error.restype = c_char_p
    lib.fd_status_name.argtypes = (c_int32,)
    lib.fd_status_name.restype = c_char_p
    lib.fd_backend_count.argtypes = ()
    lib.fd_backend_count.restype = c_int32
    lib.fd_backend_get.argtypes = (c_int32, POINTER(BackendDescription))
    for operation in ("forward", "backward", "step"):
        getattr(lib, f"fd_{operation}").argtypes = (c_void_p, c_void_p, c_size_t, c_void_p)
        getattr(lib, f"fd_{operation}_workspace").argtypes = (POINTER(Problem), POINTER(c_size_t))
        getattr(lib, f"fd_{operation}_backend").argtypes = (POINTER(Problem), POINTER(c_int32))
    lib.fd_forward_saved.argtypes = (POINTER(Problem), POINTER(c_size_t))
    return lib


lib = _load()


def _operation(name: str, args: type[ctypes.Structure]) -> Operation:
    members = tuple((field[0], field[1]) for field in args._fields_[2:])
    return Operation(name, args, members, getattr(lib, f"fd_{name}"))


FORWARD = _operation("forward", ForwardArgs)
BACKWARD = _operation("backward", BackwardArgs)
STEP = _operation("step", StepArgs)

_EXCEPTIONS = {INVALID: ValueError, UNSUPPORTED: NotImplementedError}


def check(status: int) -> None:
    """Raise what a status means, with the library's message.

    FD_INVALID is ValueError, FD_UNSUPPORTED NotImplementedError, anything else RuntimeError.
    """
    if status != OK:
        message = lib.fd_last_error().decode()
        raise _EXCEPTIONS.get(status, RuntimeError)(message or lib.fd_status_name(status).decode())


def workspace_bytes(operation: str, problem: Problem) -> int:
    """Bytes of workspace of ``forward``, ``backward`` or ``step``."""
    size = c_size_t()
    check(getattr(lib, f"fd_{operation}_workspace")(problem, size))
    return size.value


def saved_bytes(problem: Problem) -> int:
    """Bytes that the forward can keep for the backward."""
    size = c_size_t()
    check(lib.fd_forward_saved(problem, size))
    return size.value


class Backend(NamedTuple):
    """One entry of the library's list of backends."""

    name: str  #: ``"sm90"``, ``"cuda"``, ``"cpu"``, ``"reference"``
    device: str  #: ``"cpu"`` or ``"cuda"``
    available: bool  #: whether it can run on this machine
    detail: str  #: what it runs on, or why it is not available


def backends() -> list[Backend]:
    """The backends compiled into the library, best first, available or not."""
    found = []
    for i in range(lib.fd_backend_count()):
        entry = BackendDescription(size=ctypes.sizeof(BackendDescription))
        check(lib.fd_backend_get(i, entry))
        device = "cuda" if entry.device == CUDA else "cpu"
        found.append(Backend(entry.name.decode(), device, bool(entry.available), entry.detail.decode()))
    return found


def version() -> str:
    """Version of the loaded library, ``"major.minor.patch"``."""
    number = lib.fd_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
