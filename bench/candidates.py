"""flashdelta and the public kernels it is compared with: FlashQLA, FlashInfer and flash-linear-attention (FLA).

Each candidate turns the same tensors into a call: `forward(data)` and its like return a function without arguments that gives
(o, final state), all gradients, or o. A candidate that lacks an operation has no such method. The call of a backward keeps all
that its forward returned, as autograd and the next layer do. `kept_on_disk`: the operations whose kernels are compiled at first
calls and found by later processes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from rows import Row

K = 128
SCALE = K**-0.5
ROTATED_BYTES = 256 << 20  # more than any L2 holds
Call = Callable[[], Any]


class Data(NamedTuple):
    """Tensors of a row over whole sequences: packed, K = V = 128, fp32 gates, strengths and states."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor
    cu_seqlens: Tensor
    do: Tensor
    dfinal_state: Tensor
    lengths: tuple[int, ...]


class StepData(NamedTuple):
    """Tensors of a decode row: raw gates and logits in bf16, states [copies * N, HV, V, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    pool: Tensor
    copies: int

    def states(self) -> list[Tensor]:
        """Own copies of the states, one tensor per call of a round: calls change them in place."""
        return list(self.pool.clone().split(self.q.shape[0]))


def data(row: Row, device: str, dtype: torch.dtype = torch.bfloat16) -> Data:
    """Normalised q and k; g = logsigmoid(normal) / 16, a quarter of the heads 0; beta = sigmoid(normal)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    T, N, H, HV = row.tokens, len(row.lengths), row.H, row.HV
    q, k = (normalize(normal(1, T, H, K), dim=-1).to(dtype) for _ in "qk")
    v, do = (normal(1, T, HV, K).to(dtype) for _ in range(2))
    g = logsigmoid(normal(1, T, HV)) / 16
    g[..., ::4] = 0
    ends = torch.tensor([0, *row.lengths], device=device).cumsum(0).int()
    beta = normal(1, T, HV).sigmoid()
    return Data(q, k, v, g, beta, normal(N, HV, K, K), ends, do, normal(N, HV, K, K) / 8, row.lengths)


def step_data(row: Row, device: str) -> StepData:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    N, T, H, HV = len(row.lengths), row.lengths[0], row.H, row.HV
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[row.state_type]
    copies = ROTATED_BYTES // (N * HV * K * K * dtype.itemsize) + 2 if device == "cuda" else 2
    pool = torch.empty(copies * N, HV, K, K, dtype=dtype, device=device)
    for part in pool.split(64):
        part.copy_(normal(*part.shape))
    q, k, v = normal(N, T, H, K), normal(N, T, H, K), normal(N, T, HV, K)
    a, b = normal(N, T, HV), normal(N, T, HV)
    A_log = torch.linspace(-3, 1, HV, device=device)
    return StepData(q, k, v, a, b, A_log, normal(HV, dtype=torch.float32), pool, copies)


class Flashdelta:
    """This library through its PyTorch functions. `context_parallel` is its option of that name."""

    def __init__(self, device: str, context_parallel: str | bool = "auto") -> None:
        import flashdelta

        self.module = flashdelta
        self.version = flashdelta.__version__
        self.backend = {"cuda": "sm90", "cpu": "cpu"}[device]
        self.step_backend = device
        self.context_parallel = context_parallel

    def _options(self) -> tuple[Any, ...]:
        from flashdelta._lib import BACKENDS
        from flashdelta._plan import Options

        context = {"auto": 0, True: 1, False: 2}[self.context_parallel]
        return tuple(Options(scale=SCALE, context_parallel=context, backend=BACKENDS[self.backend])[:9])

    def forward(self, d: Data) -> Call:
        options = {"context_parallel": self.context_parallel, "backend": self.backend, "scale": SCALE}
        return lambda: self.module.forward(
            d.q,
            d.k,
            d.v,
            d.g,
            d.beta,
            initial_state=d.initial_state,
            output_final_state=True,
            cu_seqlens=d.cu_seqlens,
            **options,
        )

    def training_forward(self, d: Data) -> Call:
        inputs = (d.q, d.k, d.v, d.g, d.beta, None, None, d.cu_seqlens, d.initial_state)
        options = self._options()
        return lambda: self.module.ops.forward_train(*inputs, True, False, *options)

    def backward(self, d: Data) -> Call:
        inputs = (d.q, d.k, d.v, d.g, d.beta, None, None, d.cu_seqlens, d.initial_state)
        options = self._options()
        forward = self.module.ops.forward_train(*inputs, True, False, *options)
        wanted = [True] * 5 + [False] * 2 + [True]

        def call() -> tuple[Tensor, ...]:
            r = self.module.ops.backward(d.do, d.dfinal_state, forward[2], wanted, *inputs, *options)
            return (*r[:5], r[7])

        return call

    def step(self, d: StepData) -> list[Call]:
        def call(state: Tensor) -> Call:
            return lambda: self.module.step_(
                d.q,
                d.k,
                d.v,
                d.a,
                d.b,
                state,
                A_log=d.A_log,
                dt_bias=d.dt_bias,
                qk_l2norm=True,
                beta_logit=True,
                state_v_first=True,
                backend=self.step_backend,
            )

        return [call(state) for state in d.states()]


class FlashQLA:
    kept_on_disk = ("forward", "training_forward", "backward")

    def __init__(self, device: str) -> None:
        self.module = importlib.import_module("flash_qla")
        self.version = metadata.version("flash-qla")

    def _call(self, d: Data, training: bool) -> Call:
        options = {"scale": SCALE, "initial_state": d.initial_state, "cu_seqlens": d.cu_seqlens}
        options |= {"enable_fwd_cp_cache": True} if training else {"output_final_state": True}
        return lambda: self.module.chunk_gated_delta_rule_fwd(d.q, d.k, d.v, d.g, d.beta, **options)

    def forward(self, d: Data) -> Call:
        run = self._call(d, False)

        def call() -> tuple[Tensor, Tensor]:
            r = run()
            return r[2], r[4]

        return call

    def training_forward(self, d: Data) -> Call:
        run = self._call(d, True)

        def call() -> tuple[Tensor, Tensor]:
            r = run()
            return r[2], r[4]

        return call

    def backward(self, d: Data) -> Call:
        forward = self._call(d, True)()
        g, A, *_, cache = forward
        options = {"scale": SCALE, "initial_state": d.initial_state, "cu_seqlens": d.cu_seqlens, "cp_cache": cache}

        def call(kept: Any = forward) -> tuple[Tensor, ...]:
            r = self.module.chunk_gated_delta_rule_bwd(d.q, d.k, d.v, g, d.beta, A, d.do, d.dfinal_state, **options)
            dq, dk, dv, dbeta, dg, dinitial = r
            return dq, dk, dv, dg, dbeta, dinitial

        return call


class FlashInfer:
    kept_on_disk = ("step",)  # the forward's two kernels are compiled by each process, 14 s

    def __init__(self, device: str) -> None:
        self.prefill = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
        decode = importlib.import_module("flashinfer.gdn_decode")
        self.decode, self.decode_many = decode.gated_delta_rule_decode_pretranspose, decode.gated_delta_rule_mtp
        self.version = metadata.version("flashinfer-python")

    def forward(self, d: Data) -> Call:
        # Its gate is the decay itself, its states are [N, HV, V, K].
        o, final = torch.empty_like(d.v[0]), torch.empty_like(d.initial_state)
        decay, initial = d.g[0].exp(), d.initial_state.transpose(-1, -2).contiguous()
        options = {"scale": SCALE, "output_final_state": True, "cu_seqlens": d.cu_seqlens, "max_seqlen": max(d.lengths)}

        def call() -> tuple[Tensor, Tensor]:
            self.prefill(
                d.q[0],
                d.k[0],
                d.v[0],
                decay,
                d.beta[0],
                initial_state=initial,
                output=o,
                output_state=final,
                **options,
            )
            return o[None], final.transpose(-1, -2)

        return call

    def step(self, d: StepData) -> list[Call]:
        o = torch.empty_like(d.v)
        every = torch.arange(d.q.shape[0], device=d.q.device, dtype=torch.int32)
        gates = {"A_log": d.A_log, "a": d.a, "dt_bias": d.dt_bias, "b": d.b, "scale": SCALE, "output": o}
        many = d.q.shape[1] > 1 and d.pool.dtype == torch.float32

        def call(state: Tensor) -> Call:
            if many:
                extra = {"initial_state": state, "initial_state_indices": every, "disable_state_update": False}
                return lambda: self.decode_many(d.q, d.k, d.v, **extra, **gates)[0]
            return lambda: self.decode(d.q, d.k, d.v, state=state, **gates)[0]

        return [call(state) for state in d.states()]


class Fla:
    kept_on_disk = ("forward", "training_forward", "backward", "step")

    def __init__(self, device: str) -> None:
        chunk = importlib.import_module("fla.ops.gated_delta_rule.chunk")
        self.fwd, self.bwd = chunk.chunk_gated_delta_rule_fwd, chunk.chunk_gated_delta_rule_bwd
        recurrent = importlib.import_module("fla.ops.gated_delta_rule.fused_recurrent")
        self.recurrent = recurrent.fused_recurrent_gated_delta_rule
        self.version = metadata.version("fla-core")

    def _call(self, d: Data) -> Call:
        options = {"scale": SCALE, "initial_state": d.initial_state, "output_final_state": True}
        return lambda: self.fwd(d.q, d.k, d.v, d.g, d.beta, cu_seqlens=d.cu_seqlens, **options)

    def forward(self, d: Data) -> Call:
        run = self._call(d)

        def call() -> tuple[Tensor, Tensor]:
            r = run()
            return r[1], r[3]

        return call

    training_forward = forward

    def backward(self, d: Data) -> Call:
        forward = self._call(d)()
        g, _, A, *_ = forward

        def call(kept: Any = forward) -> tuple[Tensor, ...]:
            inputs = (d.q, d.k, d.v, g, d.beta, A, SCALE, d.initial_state, d.do, d.dfinal_state)
            dq, dk, dv, dbeta, dg, dinitial, *_ = self.bwd(*inputs, cu_seqlens=d.cu_seqlens)
            return dq, dk, dv, dg, dbeta, dinitial

        return call

    def step(self, d: StepData) -> list[Call]:
        options = {"scale": SCALE, "output_final_state": True, "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True}
        options |= {"A_log": d.A_log, "dt_bias": d.dt_bias, "use_beta_sigmoid_in_kernel": True, "state_v_first": True}

        def call(state: Tensor) -> Call:
            return lambda: self.recurrent(d.q, d.k, d.v, g=d.a, beta=d.b, initial_state=state, **options)[0]

        return [call(state) for state in d.states()]


CANDIDATES: dict[str, Callable[[str], Any]] = {
    "flashdelta": Flashdelta,
    "flashdelta_whole": lambda device: Flashdelta(device, context_parallel=False),
    "flashdelta_split": lambda device: Flashdelta(device, context_parallel=True),
    "flash_qla": FlashQLA,
    "flashinfer": FlashInfer,
    "fla": Fla,
}


def load(names: list[str], device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The candidates that can be imported, and why the others cannot. The peers need a GPU."""
    found, missing = {}, {}
    for name in names:
        if device != "cuda" and not name.startswith("flashdelta"):
            missing[name] = "needs a CUDA device"
            continue
        try:
            found[name] = CANDIDATES[name](device)
        except Exception as problem:  # whatever a package raises when something it needs is absent
            missing[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    return found, missing
