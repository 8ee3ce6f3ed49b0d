"""Asks the library's planner whether a call is worth handing over; shared by the integrations."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .. import _lib

_TOKENS = 64  # no limit of a backend depends on the number of tokens


def refusal(operation: str, q: Tensor, v: Tensor, gradients: bool = False) -> str | None:
    """Returns why no fast backend serves a call, None if one does.

    Args:
        operation: "forward" or "step".
        q: [B, T, H, K].
        v: [B, T, HV, V].
        gradients: the backward must be served as well.
    """
    shape = (q.shape[2], v.shape[2], q.shape[3], v.shape[3])
    reason: str | None = _refusal(operation, q.device.type, q.dtype, *shape)
    if reason is None and gradients and torch.is_grad_enabled():
        reason = _refusal("backward", q.device.type, q.dtype, *shape)
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _refusal(operation: str, device: str, dtype: torch.dtype, H: int, HV: int, K: int, V: int) -> str | None:
    return _ask(operation, device, dtype, H, HV, K, V)


@functools.cache
def _ask(operation: str, device: str, dtype: torch.dtype, H: int, HV: int, K: int, V: int) -> str | None:
    if device not in ("cpu", "cuda"):
        return f"device {device}; flashdelta has backends for cpu and cuda"
    if dtype not in _lib.DTYPES:
        return f"element type {dtype}"
    problem = _lib.Problem(size=ctypes.sizeof(_lib.Problem), B=1, T=1 if operation == "step" else _TOKENS)
    problem.H, problem.HV, problem.K, problem.V = H, HV, K, V
    problem.device = _lib.CUDA if device == "cuda" else _lib.CPU
    problem.dtype = _lib.DTYPES[dtype]
    problem.gate, problem.beta = _lib.GATE_LOG, _lib.BETA_VALUE
    chosen = ctypes.c_int32()
    try:
        _lib.check(getattr(_lib.lib, f"fd_{operation}_backend")(problem, chosen))
    except (ValueError, NotImplementedError) as error:
        return str(error)
    if chosen.value == _lib.BACKENDS["reference"]:
        return f"{dtype}, {H}/{HV} heads of {K} x {V}: only the slow reference backend serves it"
    return None
