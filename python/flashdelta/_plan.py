"""From tensors to one packed C struct: shape checks, the problem struct, strides, copies.

A call is described by the layouts (dtype, shape, strides, device) of its tensors and its options. What follows from that
description alone, a `Plan`, is made once and kept; a repeated call only packs pointers between bytes that are ready.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _lib

Layout = tuple[torch.dtype, torch.Size, tuple[int, ...], int]

MAX_PLANS = 4096  # then all are dropped: a server with ever new lengths must not grow
_plans: dict[Any, Plan] = {}

_INPUTS = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T HV V",
    "g": "B T HV",
    "beta": "B T HV",
    "A_log": "HV",
    "dt_bias": "HV",
    "do_": "B T HV V",
}
_POOLS = {  # and the index that picks their rows
    "initial_state": "initial_index",
    "final_state": "final_index",
    "checkpoints": "checkpoint_index",
    "dfinal_state": "",
}
_INDICES = {  # and the member of fd_problem with their number of columns
    "initial_index": "initial_slots",
    "final_index": "final_slots",
    "checkpoint_index": "checkpoint_slots",
}
_WRITTEN = ("final_state", "checkpoints")
_GRADIENTS = {"dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state"}
_RESULTS = {"o", "final_state", "saved", "saved_bytes"} | _GRADIENTS  # what operators make
_ALIGNED = ("q", "k", "v", "do_")
_ROWS = {"initial_state": "initial_rows", "final_state": "final_rows", "checkpoints": "checkpoint_rows"}
_DTYPES = {
    "q": "dtype",
    "g": "gate_dtype",
    "beta": "beta_dtype",
    "A_log": "A_log_dtype",
    "dt_bias": "dt_bias_dtype",
    "initial_state": "initial_dtype",
    "final_state": "final_dtype",
    "checkpoints": "checkpoint_dtype",
}


class Options(NamedTuple):
    """What a call says besides its tensors; the defaults of the operators' schemas. Zero: the library's default."""

    scale: float = 0.0
    qk_l2norm: bool = False
    beta_logit: bool = False
    allow_neg_eigval: bool = False
    state_v_first: bool = False
    context_parallel: int = _lib.CONTEXT_AUTO
    l2norm_eps: float = 0.0
    context_bound: float = 0.0
    backend: int = 0
    workspace_limit: int = 0
    checkpoint_interval: int = 0


class Plan:
    """What follows from layouts and options."""

    __slots__ = (
        "_bytes",
        "_pack",
        "copies",
        "device",
        "o_shape",
        "problem",
        "run",
        "saved",
        "slots",
        "state_dtype",
        "state_shape",
        "workspace",
    )

    def __init__(self, operation: _lib.Operation, layouts: Sequence[Layout | None], options: Options, threads: int) -> None:
        names = [name for name, _ in operation.members]
        given = {name: layout for name, layout in zip(names, layouts, strict=False) if layout is not None}
        p = _problem(given, options, threads)
        self.run: Callable[..., int] = operation.run
        self.problem = p
        self.device = given["q"][3]
        self.o_shape = (p.B, p.T, p.HV, p.V)
        self.state_shape = (p.N or p.B, p.HV, p.V, p.K) if p.state_v_first else (p.N or p.B, p.HV, p.K, p.V)
        self.state_dtype = state_dtype(given["q"][0])
        copies = {name for name, layout in given.items() if _needs_copy(name, layout, p.device == _lib.CUDA)}
        #: positions of the tensors the library would refuse as they lie in memory
        self.copies = tuple(names.index(name) for name in copies)
        #: positions of the members with a pointer, or the number of a buffer's bytes: what was given, and all results
        self.slots = tuple(i for i, name in enumerate(names) if name in given or name in _RESULTS)
        args = operation.args(size=ctypes.sizeof(operation.args), problem=ctypes.addressof(p))
        for name in given.keys() - copies:  # the strides of the others are zero: contiguous
            if hasattr(member := getattr(args, name), "stride"):
                member.stride[: len(given[name][2])] = given[name][2]
        #: the struct's bytes as pieces before, between and after the slots, with room for the slots' values
        ends = [0, *(getattr(operation.args, names[i]).offset for i in self.slots)]
        filled = bytes(args)
        self._bytes: list[Any] = [filled[: ends[1]]]
        for begin, end in zip(ends[1:], [*ends[2:], len(filled)], strict=True):
            self._bytes += [0, filled[begin + 8 : end]]
        sizes = [f"{len(piece)}s" for piece in self._bytes[::2]]
        self._pack = struct.Struct("=" + "Q".join(sizes)).pack
        self.workspace = _lib.workspace_bytes(operation.name, p)
        self.saved = 0 if operation is _lib.STEP else _lib.saved_bytes(p)

    def pack(self, values: Iterable[int]) -> bytes:
        """The argument struct; `values`: one for each of `slots`."""
        pieces = self._bytes.copy()
        pieces[1::2] = values
        return self._pack(*pieces)


def find(operation: _lib.Operation, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Plan:
    """The plan of a call; `tensors` in the order of the operation's struct, trailing ones may be left out."""
    layouts = tuple([None if t is None else (t.dtype, t.shape, t.stride(), t.get_device()) for t in tensors])
    threads = torch.get_num_threads()
    key = (operation.name, layouts, options, threads)
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(operation, layouts, Options(*options), threads)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def run(plan: Plan, q: Tensor, members: Sequence[Tensor | int | None]) -> None:
    """Call the library. `members`: of the operation's struct after `size` and `problem`; trailing ones may be left out."""
    found = (members[i] if i < len(members) else None for i in plan.slots)
    values = [m.data_ptr() if isinstance(m, Tensor) else m or 0 for m in found]
    _lib.check(enqueue(plan, q, plan.pack(values)))


def enqueue(plan: Plan, q: Tensor, args: bytes) -> int:
    """The status of the library's call with a workspace, on the device and the stream in use there."""
    size = plan.workspace
    if plan.device < 0:
        if size == 0:
            return plan.run(args, None, 0, None)
        workspace = torch.empty(size + 255, dtype=torch.uint8)
        return plan.run(args, -(-workspace.data_ptr() // 256) * 256, size, None)
    # What torch.cuda.current_device() and current_stream() ask, without the objects they make of it.
    if torch._C._cuda_getDevice() != plan.device:
        with torch.cuda.device(plan.device):
            return enqueue(plan, q, args)
    stream = torch._C._cuda_getCurrentRawStream(plan.device)
    if size == 0:
        return plan.run(args, None, 0, stream)
    workspace = q.new_empty(size, dtype=torch.uint8)  # aligned to 512 bytes by its allocator
    return plan.run(args, workspace.data_ptr(), size, stream)


def copied(operation: _lib.Operation, plan: Plan, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """`tensors`, those the library would refuse as they lie in memory replaced by contiguous copies."""
    q = tensors[0]
    assert q is not None
    if not plan.copies and not q.is_cuda:
        return tensors
    result = list(tensors)
    for i in plan.copies:
        t = result[i]
        assert t is not None
        # A tensor of which torch says that it is contiguous may still have strides that the library refuses.
        result[i] = t.clone(memory_format=torch.contiguous_format)
    if q.is_cuda:
        for i, ((name, _), t) in enumerate(zip(operation.members, result, strict=False)):
            if t is not None and name in _ALIGNED and t.data_ptr() % 16 != 0 and i not in plan.copies:
                # The plan has the strides of the original, so the copy must lie the same way, on an aligned base.
                result[i] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
    return result


def problem_of(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> _lib.Problem:
    """The forward problem of tensors that may have no memory (fake kernels)."""
    layouts = [None if t is None else (t.dtype, t.shape, t.stride(), 0 if t.device.type == "cuda" else -1) for t in tensors]
    given = {name: layout for (name, _), layout in zip(_lib.FORWARD.members, layouts, strict=False) if layout is not None}
    return _problem(given, Options(*options), torch.get_num_threads())


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _problem(given: dict[str, Layout], options: Options, threads: int) -> _lib.Problem:
    """Check every shape and dtype and fill the problem struct; raises ValueError."""
    for name, rank in (("q", 4), ("v", 4), ("cu_seqlens", 1)):
        if name in given and len(given[name][1]) != rank:
            raise ValueError(f"{name} has {len(given[name][1])} dimensions, {list(given[name][1])}; must have {rank}")
    (dtype, (B, T, H, K), _, device), (_, v_shape, _, _) = given["q"], given["v"]
    sizes = {"B": B, "T": T, "H": H, "K": K, "HV": v_shape[2], "V": v_shape[3]}
    for name, (_, shape, _, where) in given.items():
        if name in _INPUTS:
            _check_shape(name, shape, _INPUTS[name].split(), sizes)
        if where != device:
            raise ValueError(f"{name} is on {_device_name(where)}; must be on q's device, {_device_name(device)}")
    for name in ("k", "v", "do_"):
        if name in given and given[name][0] != dtype:
            raise ValueError(f"{name} is {given[name][0]}; must be {dtype}, as q")
    p = _lib.Problem(size=ctypes.sizeof(_lib.Problem), threads=threads, **sizes)
    p.device = _lib.CPU if device < 0 else _lib.CUDA
    for name, member in _DTYPES.items():
        if name in given:
            if given[name][0] not in _lib.DTYPES:
                kinds = ", ".join(str(kind) for kind in _lib.DTYPES)
                raise ValueError(f"{name} is {given[name][0]}; must be one of {kinds}")
            setattr(p, member, _lib.DTYPES[given[name][0]])
    if "final_state" not in given:
        p.final_dtype = _lib.DTYPES[state_dtype(dtype)]
    if "cu_seqlens" in given:
        _fill_sequences(p, given["cu_seqlens"])
    _fill_indices(p, given)
    state = (p.N or p.B, p.HV, p.V, p.K) if options.state_v_first else (p.N or p.B, p.HV, p.K, p.V)
    _check_pools(given, state, options.state_v_first)
    for name, member in _ROWS.items():
        if name in given:
            setattr(p, member, given[name][1][0])
    p.gate = _lib.GATE_NONE if "g" not in given else _lib.GATE_RAW if "A_log" in given else _lib.GATE_LOG
    p.beta = _lib.BETA_ONE if "beta" not in given else _lib.BETA_LOGIT if options.beta_logit else _lib.BETA_VALUE
    for name in Options._fields:
        if name != "beta_logit":
            setattr(p, name, getattr(options, name))
    return p


def _device_name(index: int) -> str:
    return "cpu" if index < 0 else f"cuda:{index}"


def _check_shape(name: str, shape: Sequence[int], letters: list[str], sizes: dict[str, int]) -> None:
    wanted = [sizes[letter] for letter in letters]
    if len(shape) != len(wanted):
        raise ValueError(f"{name} has shape {list(shape)}; must be [{', '.join(letters)}] = {wanted}")
    for i, (letter, got, size) in enumerate(zip(letters, shape, wanted, strict=True)):
        if got != size:
            raise ValueError(
                f"{name} has size {got} in dimension {i} ({letter}); must be {size}: [{', '.join(letters)}] = {wanted}"
            )


def _fill_sequences(p: _lib.Problem, layout: Layout) -> None:
    dtype, (count,), _, _ = layout
    if dtype not in _lib.INDEX_DTYPES:
        raise ValueError(f"cu_seqlens is {dtype}; must be torch.int64 or torch.int32")
    if p.B != 1:
        raise ValueError(f"q has batch size {p.B} (B); must be 1 when cu_seqlens is given: sequences are packed along T")
    if count < 2:
        raise ValueError(f"cu_seqlens has {count} elements; must have N + 1, at least 2")
    p.N = count - 1
    p.cu_seqlens_dtype = _lib.INDEX_DTYPES[dtype]


def _fill_indices(p: _lib.Problem, given: dict[str, Layout]) -> None:
    N = p.N or p.B
    first = ""
    for name in (*_INDICES, "accepted"):
        if name not in given:
            continue
        dtype, shape, _, _ = given[name]
        if dtype not in _lib.INDEX_DTYPES or (first and dtype != given[first][0]):
            wanted = f"{given[first][0]}, as {first}" if first else "torch.int64 or torch.int32"
            raise ValueError(f"{name} is {dtype}; must be {wanted}")
        first = first or name
        p.index_dtype = _lib.INDEX_DTYPES[dtype]
        ranks = {"accepted": (1,), "checkpoint_index": (2,)}.get(name, (1, 2))
        if len(shape) not in ranks or shape[0] != N:
            letters = {"accepted": "[N]", "checkpoint_index": "[N, S]"}.get(name, "[N] or [N, S]")
            raise ValueError(f"{name} has shape {list(shape)}; must be {letters} with N = {N}")
        if len(shape) == 2:
            setattr(p, _INDICES[name], shape[1])


def _check_pools(given: dict[str, Layout], state_shape: tuple[int, ...], v_first: bool) -> None:
    letters = "HV, V, K" if v_first else "HV, K, V"
    for name, index in _POOLS.items():
        if name not in given:
            continue
        shape = given[name][1]
        # Without an index row n is sequence n's; a pool in which states are written may be longer.
        rows = shape[0] if index in given or name in _WRITTEN else state_shape[0]
        if shape != (rows, *state_shape[1:]) or (index not in given and rows < state_shape[0]):
            first = "P" if index in given else "N"
            wanted = [rows if index in given else state_shape[0], *state_shape[1:]]
            raise ValueError(f"{name} has shape {list(shape)}; must be [{first}, {letters}] = {wanted}")


def _needs_copy(name: str, layout: Layout, on_cuda: bool) -> bool:
    """Whether the library would refuse, or misread, a tensor as it lies in memory."""
    dtype, shape, stride, _ = layout
    if shape.numel() <= 1:
        return False
    repeated = not any(stride)  # all strides zero means contiguous to the library
    if name in _WRITTEN:
        if repeated:
            raise ValueError(f"{name} repeats one element; an output must not")
        return False
    if name in _INDICES or name in ("g", "beta", "A_log", "dt_bias"):
        return repeated
    if stride[-1] != 1 and shape[-1] != 1:
        return True
    if on_cuda and name in _ALIGNED:  # 16-byte rows, for the tensor memory accelerator
        return any(n > 1 and s * dtype.itemsize % 16 != 0 for n, s in zip(shape[:-1], stride[:-1], strict=True))
    return False
