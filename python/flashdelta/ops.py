"""The operators `torch.ops.flashdelta.*`: CPU and CUDA kernels through the C ABI, fake kernels, autograd.

    forward        o and final states, no autograd: what a call without gradients uses
    forward_train  the same, differentiable; keeps what the backward can reuse
    backward       the gradients
    forward_       forward whose final states (and checkpoints) go to rows of a pool, in place
    step           a few tokens per sequence
    step_          a few tokens per sequence, states of a pool in place

The first ten arguments and the options mean what `flashdelta.forward` says, with zero for a default. A tensor that was not
asked for comes back empty. These are the house's own names; users call the functions of `flashdelta`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from . import _direct, _lib, _plan
from ._plan import Options

MaybeTensor = Tensor | None

_MAIN = "Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? beta=None, Tensor? A_log=None, Tensor? dt_bias=None"
_TRAIN = f"{_MAIN}, Tensor? cu_seqlens=None, Tensor? initial_state=None"
_INPUTS = f"{_TRAIN}, Tensor? initial_index=None"
_OPTIONS = (
    "float scale=0.0, bool qk_l2norm=False, bool beta_logit=False, bool allow_neg_eigval=False, bool state_v_first=False, "
    "int context_parallel=0, float l2norm_eps=0.0, float context_bound=0.0, int backend=0, "
    "int workspace_limit=0"
)
_GRADIENTS = ", ".join(["Tensor"] * 8)

_library: Any = torch.library.Library("flashdelta", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str, kernel: Any, fake: Any) -> Any:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"flashdelta::{name}", fake, lib=_library)
    return getattr(torch.ops.flashdelta, name).default


def _final_state(plan: _plan.Plan, q: Tensor, wanted: bool) -> Tensor:
    return q.new_empty(plan.state_shape if wanted else (0,), dtype=plan.state_dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor = None,
    beta: MaybeTensor = None,
    A_log: MaybeTensor = None,
    dt_bias: MaybeTensor = None,
    cu_seqlens: MaybeTensor = None,
    initial_state: MaybeTensor = None,
    initial_index: MaybeTensor = None,
    output_final_state: bool = False,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
    plan = _plan.find(_lib.FORWARD, inputs, options)
    o = q.new_empty(plan.o_shape)
    final_state = _final_state(plan, q, output_final_state)
    tensors = _plan.copied(_lib.FORWARD, plan, inputs)  # held until the call is over: a copy dies with its last reference
    _plan.run(plan, q, (*tensors, o, final_state if output_final_state else None))
    return o, final_state


def _forward_train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor = None,
    beta: MaybeTensor = None,
    A_log: MaybeTensor = None,
    dt_bias: MaybeTensor = None,
    cu_seqlens: MaybeTensor = None,
    initial_state: MaybeTensor = None,
    output_final_state: bool = False,
    recompute: bool = False,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, None)
    plan = _plan.find(_lib.FORWARD, inputs, options)
    o = q.new_empty(plan.o_shape)
    final_state = _final_state(plan, q, output_final_state)
    saved = q.new_empty(0 if recompute else plan.saved, dtype=torch.uint8)
    tensors = _plan.copied(_lib.FORWARD, plan, inputs)
    outputs = (o, final_state if output_final_state else None, None, None, None)
    _plan.run(plan, q, (*tensors, *outputs, saved, saved.numel()))
    return o, final_state, saved


def with_checkpoints(options: tuple[Any, ...], interval: int) -> tuple[Any, ...]:
    """The options of `forward_`, as the planner takes them."""
    return (*Options(*options)[:-1], interval)


def _forward_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor,
    beta: MaybeTensor,
    A_log: MaybeTensor,
    dt_bias: MaybeTensor,
    cu_seqlens: MaybeTensor,
    initial_state: MaybeTensor,
    initial_index: MaybeTensor,
    state: MaybeTensor,
    final_index: MaybeTensor,
    checkpoints: MaybeTensor,
    checkpoint_index: MaybeTensor,
    checkpoint_interval: int,
    *options: Any,
) -> Tensor:
    first = state if initial_state is None else initial_state
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, first, initial_index)
    pools = (None, state, final_index, checkpoints, checkpoint_index)
    plan = _plan.find(_lib.FORWARD, (*inputs, *pools), with_checkpoints(options, checkpoint_interval))
    tensors = list(_plan.copied(_lib.FORWARD, plan, (*inputs, *pools)))
    o = tensors[10] = q.new_empty(plan.o_shape)
    _plan.run(plan, q, tensors)
    return o


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor = None,
    beta: MaybeTensor = None,
    A_log: MaybeTensor = None,
    dt_bias: MaybeTensor = None,
    cu_seqlens: MaybeTensor = None,
    initial_state: MaybeTensor = None,
    initial_index: MaybeTensor = None,
    output_final_state: bool = False,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
    plan = _plan.find(_lib.STEP, inputs, options)
    o = q.new_empty(plan.o_shape)
    final_state = _final_state(plan, q, output_final_state)
    tensors = _plan.copied(_lib.STEP, plan, inputs)
    _plan.run(plan, q, (*tensors, o, final_state if output_final_state else None))
    return o, final_state


def _step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor,
    beta: MaybeTensor,
    A_log: MaybeTensor,
    dt_bias: MaybeTensor,
    cu_seqlens: MaybeTensor,
    initial_state: MaybeTensor,
    initial_index: MaybeTensor,
    state: Tensor,
    final_index: MaybeTensor = None,
    accepted: MaybeTensor = None,
    *options: Any,
) -> Tensor:
    first = state if initial_state is None else initial_state
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, first, initial_index, None, state, final_index, accepted)
    plan = _plan.find(_lib.STEP, inputs, options)
    tensors = list(_plan.copied(_lib.STEP, plan, inputs))
    o = tensors[10] = q.new_empty(plan.o_shape)
    _plan.run(plan, q, tensors)
    return o


def _backward(
    do: MaybeTensor,
    dfinal_state: MaybeTensor,
    saved: MaybeTensor,
    wanted: list[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor = None,
    beta: MaybeTensor = None,
    A_log: MaybeTensor = None,
    dt_bias: MaybeTensor = None,
    cu_seqlens: MaybeTensor = None,
    initial_state: MaybeTensor = None,
    *options: Any,
) -> tuple[Tensor, ...]:
    main = (q, k, v, g, beta, A_log, dt_bias)
    inputs = (*main, cu_seqlens, initial_state, None, do, dfinal_state)
    plan = _plan.find(_lib.BACKWARD, inputs, options)
    gradients = _empty_gradients((*main, initial_state), wanted, plan.state_shape)
    tensors = _plan.copied(_lib.BACKWARD, plan, inputs)
    buffer = (saved, 0 if saved is None else saved.numel())
    _plan.run(plan, q, (*tensors, *buffer, *(t if t.numel() else None for t in gradients)))
    return gradients


def _empty_gradients(inputs: tuple[MaybeTensor, ...], wanted: list[bool], state_shape: Any) -> tuple[Tensor, ...]:
    shapes = [None if t is None else t.shape for t in inputs[:-1]] + [state_shape]
    return tuple(
        inputs[0].new_empty(shape, dtype=t.dtype) if want and t is not None else inputs[0].new_empty((0,))  # type: ignore[union-attr]
        for t, shape, want in zip(inputs, shapes, wanted, strict=True)
    )


# Fake kernels: what comes back, without computing it.


def _fake_o(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2], v.shape[3]))


def _fake_state_shape(q: Tensor, v: Tensor, cu_seqlens: MaybeTensor, options: tuple[Any, ...]) -> tuple[Any, ...]:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    K, V = q.shape[3], v.shape[3]
    return (N, v.shape[2], V, K) if Options(*options).state_v_first else (N, v.shape[2], K, V)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor = None,
    beta: MaybeTensor = None,
    A_log: MaybeTensor = None,
    dt_bias: MaybeTensor = None,
    cu_seqlens: MaybeTensor = None,
    initial_state: MaybeTensor = None,
    initial_index: MaybeTensor = None,
    output_final_state: bool = False,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    shape = _fake_state_shape(q, v, cu_seqlens, options) if output_final_state else (0,)
    return _fake_o(q, v), q.new_empty(shape, dtype=_plan.state_dtype(q.dtype))


def _fake_forward_train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor = None,
    beta: MaybeTensor = None,
    A_log: MaybeTensor = None,
    dt_bias: MaybeTensor = None,
    cu_seqlens: MaybeTensor = None,
    initial_state: MaybeTensor = None,
    output_final_state: bool = False,
    recompute: bool = False,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state)
    o, final_state = _fake_forward(*inputs, None, output_final_state, *options)
    saved: Any = 0
    if not recompute:
        saved = _fake_saved(inputs, options)
    return o, final_state, q.new_empty((saved,), dtype=torch.uint8)


def _fake_saved(inputs: tuple[MaybeTensor, ...], options: tuple[Any, ...]) -> Any:
    """Bytes of `saved`. The library alone knows them, and only for given sizes: for symbolic ones a new symbol."""
    if not all(type(n) is int for t in inputs if t is not None for n in t.shape):
        try:
            return torch.library.get_ctx().new_dynamic_size()
        except DynamicOutputShapeException:  # older versions of torch: compile for these sizes alone
            pass
    return _lib.saved_bytes(_plan.problem_of(inputs, options))


def _fake_in_place(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _fake_o(q, v)


def _fake_backward(
    do: MaybeTensor,
    dfinal_state: MaybeTensor,
    saved: MaybeTensor,
    wanted: list[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: MaybeTensor = None,
    beta: MaybeTensor = None,
    A_log: MaybeTensor = None,
    dt_bias: MaybeTensor = None,
    cu_seqlens: MaybeTensor = None,
    initial_state: MaybeTensor = None,
    *options: Any,
) -> tuple[Tensor, ...]:
    main = (q, k, v, g, beta, A_log, dt_bias)
    return _empty_gradients((*main, initial_state), wanted, _fake_state_shape(q, v, cu_seqlens, options))


_POOLED = _INPUTS.replace("=None", "")
forward = _define(
    f"forward({_INPUTS}, bool output_final_state=False, {_OPTIONS}) -> (Tensor o, Tensor final_state)",
    _forward,
    _fake_forward,
)
forward_train = _define(
    f"forward_train({_TRAIN}, bool output_final_state=False, bool recompute=False, {_OPTIONS})"
    " -> (Tensor o, Tensor final_state, Tensor saved)",
    _forward_train,
    _fake_forward_train,
)
backward = _define(
    f"backward(Tensor? do, Tensor? dfinal_state, Tensor? saved, bool[] wanted, {_TRAIN}, {_OPTIONS}) -> ({_GRADIENTS})",
    _backward,
    _fake_backward,
)
forward_ = _define(
    f"forward_({_POOLED}, Tensor(a!)? state, Tensor? final_index, Tensor(b!)? checkpoints, Tensor? checkpoint_index, "
    f"int checkpoint_interval, {_OPTIONS}) -> Tensor",
    _forward_,
    _fake_in_place,
)
step = _define(
    f"step({_INPUTS}, bool output_final_state=False, {_OPTIONS}) -> (Tensor o, Tensor final_state)", _step, _fake_forward
)
step_ = _define(
    f"step_({_POOLED}, Tensor(a!) state, Tensor? final_index=None, Tensor? accepted=None, {_OPTIONS}) -> Tensor",
    _step_,
    _fake_in_place,
)


# Autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], output[2])
    ctx.options = inputs[11:]
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _train_backward(ctx: Any, do: MaybeTensor, dfinal_state: MaybeTensor, _: MaybeTensor) -> tuple[MaybeTensor, ...]:
    nothing: list[MaybeTensor] = [None] * ctx.inputs
    *inputs, saved = ctx.saved_tensors
    where = (0, 1, 2, 3, 4, 5, 6, 8)  # every tensor but cu_seqlens
    needed = ctx.needs_input_grad  # shorter where trailing arguments were left out
    wanted = [i < len(needed) and needed[i] and inputs[i] is not None for i in where]
    if dfinal_state is not None and dfinal_state.numel() == 0:
        dfinal_state = None
    if do is None and dfinal_state is None:
        return tuple(nothing)
    given = (do, dfinal_state, saved, *inputs)
    run = _backward if not torch.is_grad_enabled() and _direct.is_eager(given) else backward
    for i, want, gradient in zip(where, wanted, run(do, dfinal_state, saved, wanted, *inputs, *ctx.options), strict=True):
        if want:
            nothing[i] = gradient
    return tuple(nothing)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("flashdelta has no second derivatives")


torch.library.register_autograd("flashdelta::forward_train", _train_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("flashdelta::backward", _no_second_derivative, lib=_library)


class _Train(torch.autograd.Function):
    """`forward_train` in eager mode, at a fraction of the host time that an operator's autograd takes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward_train(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0], output[1]

    @staticmethod
    def backward(ctx: Any, do: MaybeTensor, dfinal_state: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return _train_backward(ctx, do, dfinal_state, None)


def train(*inputs: Any) -> tuple[Tensor, Tensor]:
    """o and final states of `forward_train`, which has the same arguments, with their gradients."""
    if _direct.is_eager(inputs[:9]):
        return _Train.apply(*inputs)  # type: ignore[no-any-return]
    o, final_state, _ = forward_train(*inputs)
    return o, final_state
