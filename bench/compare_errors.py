"""Errors of the candidates of bench/compare.py against the float64 recurrence, and the gate on ours."""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus
from tqdm import tqdm

from candidates import SCALE, Data, K
from result_file import ROOT, Deadline, Results, progress

KINDS = ("random", "correlated", "decay")
RESULTS = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
HUGE = 1e30  # an error that is not a number
ALLOWED = 1.05  # times the best peer's error


def error_data(kind: str, seed: int, device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> Data:
    """Random tensors; "correlated": keys in one direction, strengths near 1; "decay": strong decay."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    H, HV, T, N = 2, 8, sum(lengths), len(lengths)
    q, k, v = normal(1, T, H, K), normalize(normal(1, T, H, K), dim=-1), normal(1, T, HV, K)
    g, beta = logsigmoid(normal(1, T, HV)) / 16, normal(1, T, HV).sigmoid()
    g[..., ::4] = 0
    if kind == "correlated":
        k = normal(1, 1, H, K) + 0.1 * normal(1, T, H, K)
        beta, g = 0.9 + 0.1 * beta, 0.01 * g
    if kind == "decay":
        rate = 16 * torch.rand(HV, generator=generator, device=device)
        g = -rate * softplus(normal(1, T, HV))
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v, do = (x.to(dtype) for x in (q, k, v, normal(1, T, HV, K)))
    return Data(q, k, v, g, beta, normal(N, HV, K, K), ends, do, normal(N, HV, K, K) / 8, lengths)


def truth(d: Data) -> dict[str, Tensor]:
    """Results and gradients of the float64 recurrence."""
    sys.path.insert(0, str(ROOT / "tests/python"))
    from reference import gated_delta_rule

    leaves = [x.double().requires_grad_() for x in (d.q, d.k, d.v, d.g, d.beta, d.initial_state)]
    with torch.enable_grad(), torch.device(d.q.device):
        o, final = gated_delta_rule(*leaves[:5], initial_state=leaves[5], scale=SCALE, cu_seqlens=d.cu_seqlens)
        loss = (o * d.do.double()).sum() + (final * d.dfinal_state.double()).sum()
    return dict(zip(RESULTS, (o.detach(), final.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


def worst_error(name: str, got: Tensor, expected: Tensor, d: Data) -> float:
    """Worst relative L2 error per (sequence, head); HUGE where there is a NaN."""
    got, expected = got.double(), expected.double()
    if name in ("final_state", "dinitial_state"):
        parts = [(got.flatten(2), expected.flatten(2))]
    else:
        ends = d.cu_seqlens.tolist()
        cut = [(got[:, a:b], expected[:, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        parts = [tuple(x.transpose(1, 2).flatten(2) for x in pair) for pair in cut]  # type: ignore[misc]
    ratios = torch.cat([((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).flatten() for a, b in parts])
    return float(torch.nan_to_num(ratios, nan=HUGE, posinf=HUGE).max())


def errors_of(candidate: Any, d: Data, expected: dict[str, Tensor]) -> dict[str, float]:
    """The error of every result the candidate has."""
    with torch.no_grad():
        got: dict[str, Tensor] = dict(zip(RESULTS[:2], candidate.forward(d)(), strict=True))
        if hasattr(candidate, "backward"):
            try:
                got |= dict(zip(RESULTS[2:], candidate.backward(d)(), strict=True))
            except NotImplementedError as reason:
                tqdm.write(f"no gradients: {reason}")
    return {name: worst_error(name, x, expected[name], d) for name, x in got.items()}


def measure(
    found: dict[str, Any], results: Results, device: str, seeds: int, lengths: tuple[int, ...], deadline: Deadline
) -> int:
    """Medians over the seeds into `results`, cell by cell; how many cells of ours are above the best peer's.

    A cell that time does not suffice for is left out. In fp16 only ours is measured: its goal is a share of bf16's error.
    """
    cells = [(kind, dtype) for dtype in (torch.bfloat16, torch.float16) for kind in KINDS]
    bar = progress(total=len(cells) * seeds, desc="errors", unit="set")
    above = left_out = 0
    for kind, dtype in cells:
        cell = f"errors/{kind}/{str(dtype)[6:]}"
        able = {name: c for name, c in found.items() if dtype == torch.bfloat16 or name.startswith("flashdelta")}
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in able}
        for seed in range(seeds):
            if deadline.left() < 0:
                break
            d = error_data(kind, seed, device, dtype, lengths)
            expected = truth(d)
            for name, candidate in able.items():
                try:
                    seen[name].append(errors_of(candidate, d, expected))
                except Exception as problem:  # one candidate's failure is a result, not the end
                    results.add_failure(f"{cell}/{name}", problem)
            bar.update()
        medians: dict[str, dict[str, float]] = {}
        for name, values in seen.items():
            if len(values) == seeds:
                medians[name] = {result: statistics.median(v[result] for v in values) for result in values[0]}
                results.add(f"{cell}/{name}", seeds, 0.0, 0.0, **medians[name])
                shown = ", ".join(f"{result} {value:.2e}" for result, value in medians[name].items())
                bar.write(f"{cell}/{name}: {shown}")
        left_out += not medians
        for line in beyond(medians):
            above += 1
            bar.write(f"ABOVE {cell}/{line}")
        results.save()
    bar.close()
    print(
        f"errors: {left_out} of {len(cells)} cells left for lack of time, {above} results above the best peer's; {results.path}"
    )
    return above


def beyond(medians: dict[str, dict[str, float]]) -> list[str]:
    """Our results whose error is more than ALLOWED times the best peer's."""
    peers = [errors for name, errors in medians.items() if not name.startswith("flashdelta")]
    found = []
    for name in (name for name in medians if name.startswith("flashdelta")):
        for result, error in medians[name].items():
            best = min((errors[result] for errors in peers if result in errors), default=HUGE)
            if error > ALLOWED * best:
                found.append(f"{name}: {result} {error:.2e}, best peer {best:.2e}")
    return found
