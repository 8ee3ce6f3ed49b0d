"""The gated delta rule as its definition, one token after another, in torch float64: what every test here compares with."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta_logit: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] and final states [N, HV, K, V] (or [N, HV, V, K]), both float64, differentiable by autograd."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        runs = []
        for n, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
            part = [None if t is None else t[:, begin:end] for t in (q, k, v, g, beta)]
            start = None if initial_state is None else initial_state[n : n + 1]
            options = {"scale": scale, "qk_l2norm": qk_l2norm, "A_log": A_log, "dt_bias": dt_bias, "beta_logit": beta_logit}
            options |= {"allow_neg_eigval": allow_neg_eigval, "state_v_first": state_v_first}
            runs.append(gated_delta_rule(*part, initial_state=start, **options))
        rest = v.new_zeros((1, q.shape[1] - ends[-1], *v.shape[2:]), dtype=torch.float64)
        return torch.cat([o for o, _ in runs] + [rest], 1), torch.cat([state for _, state in runs])
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k, v = q.double(), k.double(), v.double()
    if qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    gate = torch.zeros(B, T, HV, dtype=torch.float64) if g is None else g.double()
    if A_log is not None:
        bias = 0 if dt_bias is None else dt_bias.double()
        gate = -A_log.double().exp() * torch.nn.functional.softplus(gate + bias, threshold=700)
    write = torch.ones(B, T, HV, dtype=torch.float64) if beta is None else beta.double()
    if beta_logit:
        write = write.sigmoid() * (2 if allow_neg_eigval else 1)
    if initial_state is None:
        S = torch.zeros(B, HV, K, V, dtype=torch.float64)
    else:
        S = initial_state.double().transpose(-1, -2) if state_v_first else initial_state.double()
    outputs = []
    for t in range(T):
        S = gate[:, t].exp()[..., None, None] * S
        delta = write[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, ..., None] * delta[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    o = (K**-0.5 if scale is None else scale) * torch.stack(outputs, 1) if T else v.new_zeros(B, 0, HV, V)
    return o, S.transpose(-1, -2) if state_v_first else S


def inputs(
    B: int = 1,
    T: int = 100,
    H: int = 2,
    HV: int = 4,
    K: int = 32,
    V: int = 40,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    N: int | None = None,
    gates: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random q, k (unit rows), v, g, beta and initial states of N (default B) sequences."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    gates = gates or (torch.float64 if dtype == torch.float64 else torch.float32)
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V)
    g = torch.nn.functional.logsigmoid(normal(B, T, HV)) / 16
    g[..., : HV // 4] = 0
    beta = normal(B, T, HV).sigmoid()
    state = normal(B if N is None else N, HV, K, V)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return q.to(dtype), k.to(dtype), v.to(dtype), g.to(gates), beta.to(gates), state.to(gates)


def error(got: Tensor, expected: Tensor, head_dim: int | None = None) -> float:
    """Relative L2 error; per slice of dimensions 0 and `head_dim` the worst. NaN counts as infinite."""
    assert got.shape == expected.shape, f"{got.shape} against {expected.shape}"
    truth = expected.detach().double()
    difference = got.detach().double() - truth
    if head_dim is not None:
        keep = {0, head_dim}
        others = [i for i in range(truth.dim()) if i not in keep]
        if others:
            difference, truth = (x.square().sum(others).sqrt() for x in (difference, truth))
        else:
            difference, truth = difference.abs(), truth.abs()
    else:
        difference, truth = difference.norm(), truth.norm()
    ratio = torch.where(difference == 0, 0.0, difference / truth)
    return float(torch.nan_to_num(ratio, nan=float("inf")).max()) if ratio.numel() else 0.0
