"""The short way of an eager call that is already known: past PyTorch's dispatcher and past every check.

The first call of its kind goes the long way: its arguments are checked, tensors are converted where need be, and PyTorch
dispatches an operator of `ops`. If it succeeded with the very tensors that the caller gave, the next call with equal options
and layouts needs the same plan, so nothing is left to decide: outputs are allocated, pointers packed, the library is called.
Whoever could see or change a call on its way through the dispatcher (autograd, modes, transforms, tracers, the profiler,
subclasses of tensors) gets it the long way. So does a call that the library refuses, for the error's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.nn import Parameter

from . import _lib, _plan

_len_torch_function_stack: Callable[[], int] = torch._C._len_torch_function_stack
_profiler_enabled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


class _Known(NamedTuple):
    plan: _plan.Plan
    final_state: bool  #: whether the call makes one
    like_initial: bool  #: of the initial state's shape and dtype
    tail: tuple[int, ...]  #: of the struct's slots: no `saved`


_known: dict[Any, _Known] = {}
_OPTION_TYPES = {bool, int, float, str, type(None)}
_TENSOR_TYPES = {Tensor, Parameter}
_DEVICES = {"cpu", "cuda"}


def _unseen() -> bool:
    """Whether nobody but autograd could see or change a call of plain tensors on its way through the dispatcher."""
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def is_eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernel of an operator may be called without PyTorch's dispatcher, which would do nothing but call it."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and _unseen()
        and all(t is None or (type(t) in _TENSOR_TYPES and t.device.type in _DEVICES and not t.is_neg()) for t in tensors)
    )


def _key(asked: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """All that a call's plan, and whether it may go the short way, depend on."""
    grad = torch.is_grad_enabled()
    key: list[Any] = [_autocast(tensors[0]), asked, torch.get_num_threads()]
    for t in tensors:
        if t is None:
            key.append(None)
        else:
            # A view of negated numbers takes every second element of a complex tensor, so it is not contiguous.
            strides = None if t.is_contiguous() else (t.stride(), t.is_neg())
            key += (type(t), t.dtype, t.shape, strides, t.device, grad and t.requires_grad)
    return tuple(key)


def _autocast(q: Tensor) -> bool:
    """Whether q, k and v would be cast."""
    return q.dtype is torch.float32 and torch.is_autocast_enabled(q.device.type)


def remember(
    asked: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    used: tuple[Tensor | None, ...],
    operation: _lib.Operation,
    options: tuple[Any, ...],
    final_state: bool,
) -> None:
    """Keep the plan of a call that went the long way without error, if the next of its kind need not.

    `asked`: function and options as the caller gave them; `tensors`: the caller's, in the order of the operation's struct;
    `used`: what the first of them became; `options`: as for `_plan.find`; `final_state`: whether the call made one.
    """
    if not is_eager(tensors) or any(a is not b for a, b in zip(used, tensors, strict=False)):
        return
    given = [t for t in tensors if t is not None]
    if (
        any(type(option) not in _OPTION_TYPES for option in asked)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        # The one contiguous tensor that could be a view of negated numbers.
        or any(t.is_floating_point() and t.numel() == 1 for t in given)
        or _autocast(given[0])
    ):
        return
    plan = _plan.find(operation, tensors, options)
    if plan.copies:
        return
    if len(_known) >= _plan.MAX_PLANS:
        _known.clear()
    initial = tensors[8]
    like_initial = initial is not None and initial.shape == plan.state_shape and initial.dtype == plan.state_dtype
    tail = () if operation is _lib.STEP else (0, 0)
    _known[_key(asked, tensors)] = _Known(plan, final_state, like_initial, tail)


def call(
    asked: tuple[Any, ...], inputs: tuple[Any, ...], pools: tuple[Tensor | None, ...] = ()
) -> tuple[Tensor, Tensor | None] | None:
    """o and the final state, if wanted, of a known call; None: it must go the long way.

    `inputs`: q to initial_index; `pools`: for calls in place, what the operation's struct has after o.
    """
    if torch.compiler.is_dynamo_compiling() or not _unseen():
        return None
    try:
        known = _known.get(_key(asked, (*inputs, None, *pools) if pools else inputs))
    except (AttributeError, RuntimeError, TypeError):  # no tensor, no hash, no strides: what it is, the long way says
        return None
    if known is None:
        return None
    plan, makes_state, like_initial, tail = known
    values = [t.data_ptr() for t in inputs if t is not None]
    if (values[0] | values[1] | values[2]) % 16 != 0:  # a GPU needs copies of q, k and v
        return None
    o = torch.empty_like(inputs[2], memory_format=torch.contiguous_format)  # v has its shape and dtype
    if not makes_state:
        final_state = None
    elif like_initial:  # half the time of new_empty
        final_state = torch.empty_like(inputs[8], memory_format=torch.contiguous_format)
    else:
        final_state = inputs[0].new_empty(plan.state_shape, dtype=plan.state_dtype)
    values.append(o.data_ptr())
    state = pools[0] if pools else final_state
    values.append(0 if state is None else state.data_ptr())
    values += [t.data_ptr() for t in pools[1:] if t is not None]
    if _plan.enqueue(plan, inputs[0], plan.pack((*values, *tail))) != _lib.OK:
        return None
    return o, final_state
