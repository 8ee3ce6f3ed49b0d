"""The PyTorch layer on a CUDA device. Without a Hopper GPU everything here is skipped, with the reason.

`--host-time` also demands that the host time of a call is short: only a quiet machine can promise that.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashdelta
from flashdelta import _lib, ops
from flashdelta._plan import Options
from reference import error, gated_delta_rule, inputs

BACKENDS = {backend.name: backend for backend in flashdelta.backends()}
WHY_NOT = {
    name: "" if name in BACKENDS and BACKENDS[name].available else getattr(BACKENDS.get(name), "detail", "not built in")
    for name in ("sm90", "cuda")
}
pytestmark = pytest.mark.skipif(bool(WHY_NOT["sm90"]), reason=f"sm90: {WHY_NOT['sm90']}")

SM90 = {"backend": "sm90"}
STEP = {"backend": "cuda"}
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2.5e-3}  # worst (sequence, head); 16-bit operands, fp32 sums
GRADIENT_LIMITS = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
HOST_MICROSECONDS = 20
FIRST_CALL_MILLISECONDS = 50


def tensors(T: int = 150, **sizes: Any) -> tuple[Tensor, ...]:
    """q, k, v, g, beta, initial states on the device; heads of 128, bf16 unless `sizes` say otherwise."""
    sizes = {"H": 2, "HV": 4, "K": 128, "V": 128, "dtype": torch.bfloat16, "gates": torch.float32} | sizes
    *main, state = inputs(T=T, **sizes)
    return tuple(t.cuda() for t in (*main, state.float()))


def cpu(*given: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.cpu() for t in given]


def close(got: tuple[Tensor, Tensor], *given: Tensor, limit: float, **options: Any) -> None:
    """Compares o and final states with the float64 recurrence on the CPU."""
    *main, state = cpu(*given)
    ends = options.pop("cu_seqlens", None)
    o, final = gated_delta_rule(*main, initial_state=state, cu_seqlens=None if ends is None else ends.cpu(), **options)
    assert error(got[0].cpu(), o, 2) < limit
    assert error(got[1].cpu(), final, 1) < limit


def has_backward() -> str:
    """Empty if the backend has gradients, else the reason."""
    problem = _lib.Problem(size=_lib.ctypes.sizeof(_lib.Problem), B=1, T=64, H=1, HV=1, K=128, V=128)
    problem.device, problem.backend, problem.dtype = _lib.CUDA, _lib.BACKENDS["sm90"], _lib.DTYPES[torch.bfloat16]
    found = _lib.c_int32()
    status = _lib.lib.fd_backward_backend(problem, found)
    return "" if status == _lib.OK else _lib.lib.fd_last_error().decode()


@pytest.fixture
def backward() -> None:
    """Skips the test where the backend has no gradients."""
    if reason := has_backward():
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("T", [1, 64, 65, 300])
def test_forward_is_right(T: int, dtype: torch.dtype) -> None:
    given = tensors(T=T, B=2, dtype=dtype)
    got = flashdelta.forward(*given[:5], initial_state=given[5], output_final_state=True, **SM90)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    close(got, *given, limit=LIMITS[dtype] * (4 if T == 1 else 1))


def test_forward_of_packed_sequences_with_raw_gates_and_norms() -> None:
    q, k, v, g, beta, state = tensors(T=260, N=4, V=192)
    ends = torch.tensor([0, 100, 100, 163, 250], dtype=torch.int32, device="cuda")
    q, k = 3 * q, 2 * k
    A_log, dt_bias = torch.rand(4, device="cuda"), torch.randn(4, device="cuda")
    options = {"qk_l2norm": True, "beta_logit": True, "A_log": A_log, "dt_bias": dt_bias}
    a, b = 2 * torch.randn_like(g), torch.randn_like(beta)
    got = flashdelta.forward(q, k, v, a, b, cu_seqlens=ends, initial_state=state, output_final_state=True, **options, **SM90)
    assert not got[0][:, 250:].any()
    options |= {"A_log": A_log.cpu(), "dt_bias": dt_bias.cpu()}
    expected, final = gated_delta_rule(*cpu(q, k, v, a, b), initial_state=state.cpu(), cu_seqlens=ends.cpu(), **options)
    for begin, end in ((0, 100), (100, 163), (163, 250)):
        assert error(got[0][:, begin:end].cpu(), expected[:, begin:end], 2) < LIMITS[torch.bfloat16]
    assert error(got[1].cpu(), final, 1) < LIMITS[torch.bfloat16]
    assert torch.equal(got[1][1], state[1])  # a sequence without tokens passes its state through


def test_strided_and_misaligned_tensors() -> None:
    q, k, v, g, beta, state = tensors(B=1)
    expected = flashdelta.forward(q, k, v, g, beta, initial_state=state, output_final_state=True, **SM90)
    packed = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], 2)
    q1, k1, v1 = (x.view(1, 150, -1, 128) for x in packed.split([256, 256, 512], 2))
    odd = torch.empty(v.numel() + 1, dtype=v.dtype, device="cuda")[1:].view_as(v).copy_(v)
    transposed = q.transpose(1, 3).contiguous().transpose(1, 3)
    for other in ((q1, k1, v1), (transposed, k, odd)):
        got = flashdelta.forward(*other, g, beta, initial_state=state, output_final_state=True, **SM90)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_pool_in_place() -> None:
    q, k, v, g, beta, _ = tensors(T=200, N=2)
    ends = torch.tensor([0, 70, 200], device="cuda")
    pool = torch.randn(5, 4, 128, 128, device="cuda")
    before = pool.clone()
    rows = torch.tensor([3, 1], device="cuda")
    o = flashdelta.forward_(q, k, v, g, beta, pool, initial_index=rows, final_index=rows, cu_seqlens=ends, **SM90)
    expected, final = flashdelta.forward(
        q, k, v, g, beta, initial_state=before[rows], output_final_state=True, cu_seqlens=ends, **SM90
    )
    assert torch.equal(o, expected)
    assert torch.equal(pool[rows], final)
    untouched = torch.tensor([0, 2, 4], device="cuda")
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.skipif(bool(WHY_NOT["cuda"]), reason=f"cuda: {WHY_NOT['cuda']}")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("T", [1, 4])
def test_step_updates_rows_of_a_pool(T: int, state_v_first: bool, state_dtype: torch.dtype) -> None:
    q, k, v, g, beta, _ = tensors(B=3, T=T)
    pool = torch.randn(6, 4, 128, 128, device="cuda").to(state_dtype)
    before = pool.clone()
    rows = torch.tensor([4, 0, 2], device="cuda", dtype=torch.int32)
    options = {"state_v_first": state_v_first, "qk_l2norm": True}
    o = flashdelta.step_(q, k, v, g, beta, pool, initial_index=rows, final_index=rows, **options, **STEP)
    close((o, pool[rows.long()]), q, k, v, g, beta, before[rows.long()], limit=LIMITS[torch.bfloat16], **options)
    assert torch.equal(pool[1::2], before[1::2])


def gradients(given: tuple[Tensor, ...], do: Tensor, dfinal: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    o, final = flashdelta.forward(*leaves[:5], initial_state=leaves[5], output_final_state=True, **options, **SM90)
    torch.autograd.backward([o, final], [do, dfinal])
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


@pytest.mark.usefixtures("backward")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_right(recompute: bool, dtype: torch.dtype) -> None:
    given = tensors(T=200, dtype=dtype, N=3)
    ends = torch.tensor([0, 90, 90, 200], device="cuda")
    do, dfinal = torch.randn_like(given[2]), torch.randn_like(given[5])
    got = gradients(given, do, dfinal, cu_seqlens=ends, recompute=recompute)
    truths = [t.cpu().double().requires_grad_() for t in given]
    o, final = gated_delta_rule(*truths[:5], initial_state=truths[5], cu_seqlens=ends.cpu())
    torch.autograd.backward([o, final], [do.cpu().double(), dfinal.cpu().double()])
    for name, x, truth in zip(["q", "k", "v", "g", "beta", "state"], got, truths, strict=True):
        dim = 1 if name == "state" else 2
        assert error(x.cpu(), truth.grad, dim) < GRADIENT_LIMITS[dtype], name
    for _ in range(100):
        again = gradients(given, do, dfinal, cu_seqlens=ends, recompute=recompute)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.usefixtures("backward")
def test_gradients_through_raw_gates_and_norms() -> None:
    q, k, v, g, beta, state = tensors(T=130)
    a, b = 2 * torch.randn_like(g), torch.randn_like(beta)
    A_log, dt_bias = torch.rand(4, device="cuda"), torch.randn(4, device="cuda")
    everything = [t.requires_grad_() for t in (q, k, v, a, b, state, A_log, dt_bias)]
    options = {"qk_l2norm": True, "beta_logit": True}
    o, _ = flashdelta.forward(*everything[:5], initial_state=state, A_log=A_log, dt_bias=dt_bias, **options, **SM90)
    do = torch.randn_like(o)
    o.backward(do)
    truths = [t.detach().cpu().double().requires_grad_() for t in everything]
    expected, _ = gated_delta_rule(*truths[:5], initial_state=truths[5], A_log=truths[6], dt_bias=truths[7], **options)
    expected.backward(do.cpu().double())
    for got, truth in zip(everything, truths, strict=True):
        assert got.grad is not None
        assert error(got.grad.cpu(), truth.grad) < GRADIENT_LIMITS[torch.bfloat16]


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call, and what its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("context_parallel", ["auto", False])
def test_graph_whose_lengths_change(context_parallel: str | bool) -> None:
    q, k, v, g, beta, state = tensors(T=400, N=3)
    ends = torch.tensor([0, 128, 300, 400], device="cuda", dtype=torch.int32)
    options = {"cu_seqlens": ends, "initial_state": state, "output_final_state": True}

    def call() -> tuple[Tensor, Tensor]:
        return flashdelta.forward(q, k, v, g, beta, context_parallel=context_parallel, **options, **SM90)

    graph, (o, final) = captured(call)
    for changed in ([0, 128, 300, 400], [0, 1, 1, 64], [0, 400, 400, 400], [0, 0, 0, 0], [0, 63, 320, 390]):
        ends.copy_(torch.tensor(changed))
        o.fill_(float("nan"))
        final.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = call()
        assert torch.equal(o, expected[0]), changed
        assert torch.equal(final, expected[1]), changed


@pytest.mark.usefixtures("backward")
def test_graph_of_a_training_step() -> None:
    given = [t.requires_grad_() for t in tensors(T=200)]
    do = torch.randn_like(given[2])

    def call() -> tuple[Tensor, ...]:
        o, _ = flashdelta.forward(*given[:5], initial_state=given[5], **SM90)
        return torch.autograd.grad(o, given, do)

    graph, results = captured(call)
    with torch.no_grad():
        for t in given[:3]:
            t.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, call(), strict=True))


def test_work_follows_the_current_stream() -> None:
    q, k, v, g, beta, state = tensors(T=1000)
    expected, _ = flashdelta.forward(q, k, v, g, beta, initial_state=state, **SM90)
    side = torch.cuda.Stream()
    late = torch.zeros_like(v)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles: the input comes late on this stream
        late.copy_(v)
        o, _ = flashdelta.forward(q, k, late, g, beta, initial_state=state, **SM90)
    side.synchronize()
    assert torch.equal(o, expected)


def test_bitwise_the_same_every_time_and_alone() -> None:
    q, k, v, g, beta, state = tensors(T=700, N=3, H=4, HV=8)
    ends = torch.tensor([0, 300, 340, 700], device="cuda")
    options = {"output_final_state": True, "context_parallel": False}
    first = flashdelta.forward(q, k, v, g, beta, cu_seqlens=ends, initial_state=state, **options, **SM90)
    for _ in range(200):
        again = flashdelta.forward(q, k, v, g, beta, cu_seqlens=ends, initial_state=state, **options, **SM90)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])
    for n, (begin, end) in enumerate(((0, 300), (300, 340), (340, 700))):
        part = (t[:, begin:end] for t in (q, k, v, g, beta))
        o, final = flashdelta.forward(*part, initial_state=state[n : n + 1], **options, **SM90)
        assert torch.equal(o, first[0][:, begin:end])
        assert torch.equal(final[0], first[1][n])


def test_opcheck() -> None:
    given = tensors(T=70)
    options = tuple(Options(backend=_lib.BACKENDS["sm90"])[:9])
    main = (*given[:5], None, None, None, given[5])
    torch.library.opcheck(ops.forward, (*main, None, True, *options))
    pool = torch.randn(3, 4, 128, 128, device="cuda")
    rows = torch.tensor([1], device="cuda")
    torch.library.opcheck(ops.forward_, (*main[:8], None, rows, pool, rows, None, None, 0, *options))
    few = (*(t[:, :2].contiguous() for t in given[:5]), None, None, None)
    step_options = tuple(Options(backend=_lib.BACKENDS["cuda"])[:9])
    torch.library.opcheck(ops.step_, (*few, None, rows, pool, rows, None, *step_options))
    if reason := has_backward():
        pytest.skip(f"the rest needs gradients: {reason}")
    train = [t.clone().requires_grad_() if t is not None else t for t in main]
    torch.library.opcheck(ops.forward_train, (*train, True, False, *options))


def test_compile_forward_and_step() -> None:
    torch._dynamo.reset()
    given = tensors(T=100)

    def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        o, final = flashdelta.forward(2 * q, k, v, g, beta, initial_state=state, output_final_state=True, **SM90)
        one = flashdelta.step_(q[:, :1].clone(), k[:, :1], v[:, :1], g[:, :1], beta[:, :1], final, **STEP)
        return o.float().sum(1, keepdim=True) + one.float()

    with torch.no_grad():
        expected = model(*given)
        got = torch.compile(model, fullgraph=True)(*given)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("backward")
def test_compile_training() -> None:
    torch._dynamo.reset()
    given = tensors(T=100)

    def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        return flashdelta.forward(2 * q, k, v, g, beta, initial_state=state, **SM90)[0].float().square().sum()

    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


def test_refusals_say_why() -> None:
    q, k, v, g, beta, _ = tensors(T=10, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="dtype"):
        flashdelta.forward(q, k, v, g, beta, **SM90)
    q, k, v, g, beta, _ = tensors(T=10, K=64)
    with pytest.raises(NotImplementedError, match="K is 64"):
        flashdelta.forward(q, k, v, g, beta, **SM90)


def host_microseconds(call: Callable[[], Any]) -> float:
    """Median over samples of ten calls one after another, from an idle device on: its queue never is full."""
    samples = []
    call()
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        samples.append((time.perf_counter() - start) / 10 * 1e6)
    return statistics.median(samples)


def test_host_time(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v, g, beta, _ = tensors(T=512, H=16, HV=32)
    one = [t[:, :1].contiguous() for t in (q, k, v, g, beta)]
    pool = torch.randn(1, 32, 128, 128, device="cuda")
    with torch.no_grad():
        times = {
            "forward, 1 x 512": host_microseconds(lambda: flashdelta.forward(q, k, v, g, beta, **SM90)),
            "step_, one token": host_microseconds(lambda: flashdelta.step_(*one, pool, **STEP)),
        }
    with capsys.disabled():
        for name, microseconds in times.items():
            print(f"\nhost time of an eager call: {name}: {microseconds:.1f} us", end="")
    assert all(0 < microseconds < 10_000 for microseconds in times.values())
    if request.config.getoption("--host-time"):
        assert max(times.values()) <= HOST_MICROSECONDS


FIRST_CALL = """
import time
import torch
import flashdelta
q, k = (torch.randn(1, 512, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in "qk")
v = torch.randn(1, 512, 8, 128, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
start = time.perf_counter()
flashdelta.forward(q, k, v, qk_l2norm=True, backend="sm90")
torch.cuda.synchronize()
print((time.perf_counter() - start) * 1e3)
"""


def test_first_call_of_a_process(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is compiled or tuned at the first call."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    milliseconds = float(done.stdout)
    with capsys.disabled():
        print(f"\nfirst call of a process, device in use: {milliseconds:.1f} ms", end="")
    assert 0 < milliseconds < 5000
    if request.config.getoption("--host-time"):
        assert milliseconds <= FIRST_CALL_MILLISECONDS
