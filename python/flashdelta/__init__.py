"""The gated delta rule (Gated DeltaNet) on CPUs and NVIDIA GPUs.

Per value head, with state S (K x V), log-gate g_t <= 0 and write strength beta_t::

    S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - exp(g_t) S_{t-1}^T k_t)^T
    o_t = scale * S_t^T q_t

`chunk_gated_delta_rule` and `fused_recurrent_gated_delta_rule` are called as in flash-linear-attention (FLA 0.6.0);
`forward`, `forward_`, `step` and `step_` offer everything the library has. Letters: B batch, T tokens, N sequences, H query
and key heads, HV value heads (a multiple of H), K and V head dims, P rows of a pool of states, S columns of an index.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from . import _direct, _lib, ops
from ._lib import BACKENDS as _BACKENDS
from ._lib import Backend, backends, version

__all__ = [
    "Backend",
    "backends",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "forward",
    "forward_",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "step",
    "step_",
]
__version__ = version()

#: Without gradients, `fused_recurrent_gated_delta_rule` takes the token-by-token step up to this many tokens per sequence.
STEP_TOKENS = 8

_CONTEXT_PARALLEL: dict[Any, int] = {"auto": 0, True: 1, False: 2}
_HALVES = (torch.bfloat16, torch.float16)
_KEYWORDS = ("chunk_size", "head_first", "transpose_state_layout")


def _autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast the fp32 ones of q, k and v become halves of one dtype; gates and states stay as they are."""
    if q.device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    for t in (v, k, q):
        if t.dtype in _HALVES:
            dtype = t.dtype
    q, k, v = (t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, v))
    return q, k, v


def _number(table: dict[Any, int], name: str, value: Any) -> int:
    if value not in table:
        raise ValueError(f"{name} is {value!r}; must be one of {', '.join(repr(key) for key in table)}")
    return table[value]


def _options(
    scale: float | None,
    use_qk_l2norm: bool,
    beta_is_logit: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
    context_parallel: str | bool = "auto",
    l2norm_eps: float = 1e-6,
    context_bound: float | None = None,
    backend: str = "auto",
    workspace_limit: int | None = None,
) -> tuple[Any, ...]:
    """The trailing arguments of the operators, without those that are defaults all the way to the end."""
    if scale is None:
        scale = 0.0
    elif scale == 0:
        raise ValueError("scale is 0; must not be: every output would be zero")
    if allow_neg_eigval and not beta_is_logit:
        raise ValueError(
            "allow_neg_eigval=True means 2 * sigmoid(beta) and needs use_beta_sigmoid_in_kernel=True; plain beta in [0, 2] "
            "needs no flag"
        )
    if l2norm_eps <= 0:
        raise ValueError(f"l2norm_eps is {l2norm_eps}; must be positive")
    usual = (float(scale), use_qk_l2norm, beta_is_logit, allow_neg_eigval, state_v_first)
    context = _number(_CONTEXT_PARALLEL, "context_parallel", context_parallel)
    bound = 0.0 if context_bound is None else context_bound or -1.0
    eps = 0.0 if l2norm_eps == 1e-6 else l2norm_eps
    if workspace_limit is not None and workspace_limit <= 0:
        raise ValueError(f"workspace_limit is {workspace_limit}; must be positive, or None")
    rest = (context, eps, bound, _number(_BACKENDS, "backend", backend), workspace_limit or 0)
    return usual if rest == (0, 0.0, 0.0, 0, 0) else (*usual, *rest)


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> None:
    """Refuse what the operators could not tell from a legal call, or would report in other words than the user's."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k and v have shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)}; must be [B, T, H, K], "
            "[B, T, H, K] and [B, T, HV, V]"
        )
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads; must have q's {q.shape[2]} (H)")
    if v.shape[2] % q.shape[2] != 0:
        raise ValueError(f"v has {v.shape[2]} heads (HV); must be a multiple of q's {q.shape[2]} (H)")
    if beta is not None and beta.dim() == 4:
        raise ValueError(f"beta has shape {list(beta.shape)}; must be [B, T, HV]: one write strength per value head")
    if A_log is not None and g is None:
        raise ValueError("A_log is given without g; raw gates need the projection g [B, T, HV]")
    if dt_bias is not None and A_log is None:
        raise ValueError("dt_bias is given without A_log; both belong to raw gates")
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(
                f"q has batch size {q.shape[0]} (B); must be 1 when cu_seqlens is given: flatten the batch along T"
            )
        if initial_state is not None and initial_state.shape[0] != cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"initial_state has {initial_state.shape[0]} rows; must have one per sequence, {cu_seqlens.shape[0] - 1} (N)"
            )


def _run(
    asked: tuple[Any, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    initial_index: torch.Tensor | None,
    output_final_state: bool,
    recompute: bool,
    step_tokens: int,
    options: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose the operator: forward_train if a gradient is needed, else step for few tokens, else forward."""
    given = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
    if q.dtype == torch.float32 or k.dtype == torch.float32 or v.dtype == torch.float32:
        q, k, v = _autocast(q, k, v)
    if initial_state is not None and initial_state.dtype == torch.float16:
        initial_state = initial_state.float()  # exact, and served by the fast backends
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (g is not None and g.requires_grad)
        or (beta is not None and beta.requires_grad)
        or (A_log is not None and A_log.requires_grad)
        or (dt_bias is not None and dt_bias.requires_grad)
        or (initial_state is not None and initial_state.requires_grad)
    ):
        if initial_state is not None and initial_index is not None:
            kept = (initial_index >= 0).view(-1, 1, 1, 1)
            initial_state = torch.where(kept, initial_state[initial_index.clamp(min=0).long()], 0)
        inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state)
        o, final_state = ops.train(*inputs, output_final_state, recompute, *options)
    else:
        N = 1 if cu_seqlens is None else max(cu_seqlens.shape[0] - 1, 1)
        few = q.shape[1] <= step_tokens * N
        used = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
        o, final_state = (ops.step if few else ops.forward)(*used, output_final_state, *options)
        _direct.remember(asked, given, used, _lib.STEP if few else _lib.FORWARD, options, bool(output_final_state))
    return o, final_state if output_final_state else None


def _state_layout(state_v_first: bool, kwargs: dict[str, Any], known: tuple[str, ...]) -> bool:
    """Deal with the keywords that FLA's functions take beyond their signature."""
    for name in kwargs:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}")
    if kwargs.get("head_first"):
        raise ValueError("head_first=True is not supported; tensors are [B, T, H, ...]")
    if "transpose_state_layout" in kwargs:
        if state_v_first:
            raise ValueError("transpose_state_layout is the old name of state_v_first; give only state_v_first")
        warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
        return bool(kwargs["transpose_state_layout"])
    return state_v_first


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule over whole sequences, differentiable. The signature is FLA 0.6.0's.

    Args:
        q, k: [B, T, H, K], fp32, bf16 or fp16 (CPU also fp64); any strides.
        v: [B, T, HV, V], of q's dtype; HV a multiple of H, value head hv reads query and key head hv // (HV / H).
        g: [B, T, HV], natural-log decay per token, <= 0; None: no decay. With ``use_gate_in_kernel`` the raw projection.
        beta: [B, T, HV], write strength in [0, 1] (up to 2: negative eigenvalues); None: ones. With
            ``use_beta_sigmoid_in_kernel`` its logit.
        scale: of the output; None: K ** -0.5.
        initial_state: [N, HV, K, V] (``state_v_first``: [N, HV, V, K]), fp32 or bf16; None: zero. Never written.
        output_final_state: also return the states after the last tokens.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum of squares + 1e-6), in fp32.
        allow_neg_eigval: write strength 2 * sigmoid(beta); only with ``use_beta_sigmoid_in_kernel``.
        cu_seqlens: [N + 1] int64 or int32, ends of sequences packed along T, from 0; B must be 1.
        cu_seqlens_cpu, chunk_indices: accepted, not needed.
        cp_context: must be None.
        kwargs: ``use_gate_in_kernel`` with ``A_log`` [HV] and optionally ``dt_bias`` [HV]: the decay is
            -exp(A_log) * softplus(g + dt_bias); ``chunk_size`` (a hint, ignored); ``head_first=False``;
            ``transpose_state_layout`` (old name of ``state_v_first``, warns).

    Returns:
        o [B, T, HV, V] of q's dtype, and the final states [N, HV, K, V] in fp32 (fp64 for fp64 inputs), or None.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message names tensor, dimension, got and expected.
        NotImplementedError: no backend serves this call.
        TypeError: unknown keyword.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (ICLR 2025); FLA 0.6.0 ``fla.ops.gated_delta_rule``.
    """
    A_log = dt_bias = None
    if kwargs:
        known = (*_KEYWORDS, "use_gate_in_kernel", "A_log", "dt_bias")
        state_v_first = _state_layout(state_v_first, kwargs, known)
        if kwargs.get("use_gate_in_kernel"):
            A_log, dt_bias = kwargs.get("A_log"), kwargs.get("dt_bias")
            if A_log is None:
                raise ValueError("A_log is None; must be [HV] with use_gate_in_kernel=True")
    if cp_context is not None:
        raise ValueError("cp_context is given; must be None: sequences are not split over several devices")
    usual = (scale, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first)
    asked = ("chunk", output_final_state, *usual)
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, None)
    if (done := _direct.call(asked, inputs)) is not None:
        return done
    _check_tensors(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state)
    return _run(asked, *inputs, output_final_state, False, -1, _options(*usual))


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule for decoding; any T, differentiable. The signature is FLA 0.6.0's.

    Without gradients and up to `STEP_TOKENS` tokens per sequence (packed: on average) it reads and writes the states once,
    token by token; otherwise it is `chunk_gated_delta_rule`, whose arguments, results and errors it has. ``gk`` and ``gv``
    (decay per key or value channel) must be None. No input is written: `step_` updates states in place.
    """
    if kwargs:
        state_v_first = _state_layout(state_v_first, kwargs, (*_KEYWORDS, "cu_seqlens_cpu", "chunk_indices"))
    if gk is not None or gv is not None:
        name, shape = ("gk", "HV, K") if gk is not None else ("gv", "HV, V")
        raise ValueError(f"{name} is given; must be None: decay per channel [B, T, {shape}] is not supported")
    if not use_gate_in_kernel:
        A_log = dt_bias = None
    elif A_log is None:
        raise ValueError("A_log is None; must be [HV] with use_gate_in_kernel=True")
    usual = (scale, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first)
    asked = ("fused_recurrent", output_final_state, *usual)
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, None)
    if (done := _direct.call(asked, inputs)) is not None:
        return done
    _check_tensors(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state)
    return _run(asked, *inputs, output_final_state, False, STEP_TOKENS, _options(*usual))


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    initial_index: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    beta_logit: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    context_parallel: str | bool = "auto",
    context_bound: float | None = None,
    recompute: bool = False,
    workspace_limit: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Whole sequences (prefill, training), differentiable in every floating-point tensor, with all options.

    Args as `chunk_gated_delta_rule`, and:
        A_log, dt_bias: [HV], fp32, bf16 or fp16; if A_log is given, g is raw: decay -exp(A_log) * softplus(g + dt_bias).
        initial_state: with ``initial_index`` a pool [P, HV, K, V], else [N, HV, K, V].
        initial_index: [N] int64 or int32, the row each sequence starts from; -1: zero.
        qk_l2norm, l2norm_eps: divide q and k by sqrt(sum of squares + l2norm_eps).
        beta_logit: beta holds logits; ``allow_neg_eigval`` doubles their sigmoid.
        context_parallel: whether one long sequence may be split over the device: "auto", True or False. With False a
            sequence's result does not depend on the rest of the batch.
        context_bound: relative weight below which the past may be dropped when splitting; None: 2^-20; 0: exact.
        recompute: True keeps nothing for the backward, which then computes it again: less memory, more time.
        workspace_limit: bytes of temporary memory the backward should not exceed, as far as it can; None: 640 MiB. Gradients
            do not depend on it.
        backend: "auto", or one of `backends()` by name.

    Returns, raises: as `chunk_gated_delta_rule`.
    """
    wanted = (
        *(scale, qk_l2norm, beta_logit, allow_neg_eigval, state_v_first, context_parallel, l2norm_eps, context_bound),
        *(backend, workspace_limit),
    )
    asked = ("forward", output_final_state, *wanted)
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
    if (done := _direct.call(asked, inputs)) is not None:
        return done
    _check_tensors(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, None if initial_index is not None else initial_state)
    return _run(asked, *inputs, output_final_state, recompute, -1, _options(*wanted))


def forward_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor | None,
    *,
    initial_index: torch.Tensor | None = None,
    final_index: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    checkpoints: torch.Tensor | None = None,
    checkpoint_index: torch.Tensor | None = None,
    checkpoint_interval: int = 0,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    beta_logit: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    context_parallel: str | bool = "auto",
    context_bound: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Whole sequences whose states live in a pool, updated in place (serving). Not differentiable.

    Args as `forward`, and:
        state: pool [P, HV, K, V] of any row strides, fp32 or bf16, read and written; None: no final state is written.
        initial_index, final_index: [N] int64 or int32, the rows read and written; -1: start from zero, write nothing. None:
            row n is sequence n's. Written rows must be distinct and read by no other sequence.
        initial_state: another pool to read from instead of ``state``.
        checkpoints, checkpoint_index, checkpoint_interval: pool [P, HV, K, V], rows [N, S] and a multiple of 64 tokens: the
            state after (s + 1) * checkpoint_interval tokens of sequence n goes to row checkpoint_index[n, s]; -1: nowhere.

    Returns:
        o [B, T, HV, V].
    """
    wanted = (scale, qk_l2norm, beta_logit, allow_neg_eigval, state_v_first, context_parallel, l2norm_eps, context_bound)
    asked = ("forward_", checkpoint_interval, *wanted, backend)
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, state if initial_state is None else initial_state, initial_index)
    pools = (state, final_index, checkpoints, checkpoint_index)
    if (done := _direct.call(asked, inputs, pools)) is not None:
        return done[0]
    _check_tensors(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, None)
    options = _options(*wanted, backend)
    q, k, v = _autocast(q, k, v)
    others = (g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
    o: torch.Tensor = ops.forward_(q, k, v, *others, *pools, checkpoint_interval, *options)
    all_options = ops.with_checkpoints(options, checkpoint_interval)
    _direct.remember(asked, (*inputs, None, *pools), (q, k, v), _lib.FORWARD, all_options, False)
    return o


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    initial_index: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    beta_logit: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A few tokens per sequence, one after another (decoding); arguments and results of `forward`. Not differentiable."""
    usual = (scale, qk_l2norm, beta_logit, allow_neg_eigval, state_v_first)
    asked = ("step", output_final_state, *usual, l2norm_eps, backend)
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
    if (done := _direct.call(asked, inputs)) is not None:
        return done
    _check_tensors(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, None if initial_index is not None else initial_state)
    options = _options(*usual, l2norm_eps=l2norm_eps, backend=backend)
    q, k, v = _autocast(q, k, v)
    o, final_state = ops.step(q, k, v, *inputs[3:], output_final_state, *options)
    _direct.remember(asked, inputs, (q, k, v), _lib.STEP, options, bool(output_final_state))
    return o, final_state if output_final_state else None


def step_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor,
    *,
    initial_index: torch.Tensor | None = None,
    final_index: torch.Tensor | None = None,
    accepted: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    beta_logit: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """A few tokens per sequence, states of a pool updated in place (serving). Not differentiable.

    Args as `forward`, and:
        state: pool [P, HV, K, V] of any row strides, fp32 or bf16, read and written.
        initial_index, final_index: [N] int64 or int32, the rows read and written; -1: start from zero, write nothing. None:
            row n is sequence n's. Written rows must be distinct and read by no other sequence. For speculative decoding
            [N, S]: the state after token t goes to row final_index[n, t].
        accepted: [N], in [1, S]: sequence n starts from row initial_index[n, accepted[n] - 1].
        initial_state: another pool to read from instead of ``state``.

    Returns:
        o [B, T, HV, V].
    """
    usual = (scale, qk_l2norm, beta_logit, allow_neg_eigval, state_v_first)
    asked = ("step_", *usual, l2norm_eps, backend)
    inputs = (q, k, v, g, beta, A_log, dt_bias, cu_seqlens, state if initial_state is None else initial_state, initial_index)
    pools = (state, final_index, accepted)
    if (done := _direct.call(asked, inputs, pools)) is not None:
        return done[0]
    _check_tensors(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, None)
    options = _options(*usual, l2norm_eps=l2norm_eps, backend=backend)
    q, k, v = _autocast(q, k, v)
    others = (g, beta, A_log, dt_bias, cu_seqlens, initial_state, initial_index)
    o: torch.Tensor = ops.step_(q, k, v, *others, *pools, *options)
    _direct.remember(asked, (*inputs, None, *pools), (q, k, v), _lib.STEP, options, False)
    return o
