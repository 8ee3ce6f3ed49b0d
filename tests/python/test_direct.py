"""The short way of known eager calls: the same bits as the long way, and closed to calls that somebody sees or changes."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import flashdelta
from flashdelta import _direct, ops
from reference import inputs

OPERATORS = ("forward", "forward_train", "forward_", "step", "step_")
Call = Callable[[], Any]


class LongWayError(Exception):
    """A call went through an operator."""


@pytest.fixture
def only_short(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, whatever goes the long way raises `LongWayError`."""
    monkeypatch.setattr(_direct, "_known", {})

    def refuse(*_: Any) -> None:
        raise LongWayError

    return lambda: [monkeypatch.setattr(ops, name, refuse) for name in OPERATORS] and None


def calls() -> dict[str, Call]:
    """One call of each function, each with tensors of its own; those in place on a fresh pool each time."""
    q, k, v, g, beta, state = inputs(B=2, T=6)
    raw = {"A_log": torch.nn.Parameter(torch.rand(4)), "dt_bias": torch.nn.Parameter(torch.rand(4))}
    packed = tuple(t.flatten(0, 1)[None] for t in (q, k, v, g, beta))
    ends = torch.tensor([0, 3, 12])
    pool, rows = torch.randn(5, 4, 32, 40), torch.tensor([3, 1])
    points = {"checkpoint_index": torch.tensor([[4], [0]]), "checkpoint_interval": 64}

    def in_place(function: Any, **options: Any) -> Call:
        def call() -> tuple[Tensor, ...]:
            mine = pool.clone()
            more = {"checkpoints": torch.zeros_like(pool)} if "checkpoint_index" in options else {}
            o = function(q, k, v, g, beta, mine, initial_index=rows, final_index=rows, **options, **more)
            return o, mine, *more.values()

        return call

    return {
        "forward": lambda: flashdelta.forward(q, k, v, g, beta, scale=0.5, backend="cpu"),
        "states": lambda: flashdelta.forward(
            q, k, v, g, beta, initial_state=pool, initial_index=rows, output_final_state=True
        ),
        "chunk": lambda: flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True),
        "raw": lambda: flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, use_gate_in_kernel=True, **raw),
        "packed": lambda: flashdelta.chunk_gated_delta_rule(*packed, cu_seqlens=ends, initial_state=state),
        "bare": lambda: flashdelta.chunk_gated_delta_rule(q, k, v, None, None, use_qk_l2norm_in_kernel=True),
        "recurrent": lambda: flashdelta.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=state),
        "step": lambda: flashdelta.step(q, k, v, g, beta, initial_state=state, output_final_state=True),
        "forward_": in_place(flashdelta.forward_),
        "checkpoints": in_place(flashdelta.forward_, **points),
        "step_": in_place(flashdelta.step_, qk_l2norm=True),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_the_short_way_gives_the_same_bits(name: str, only_short: Call) -> None:
    call = calls()[name]
    with torch.no_grad():
        expected = call()
        only_short()
        got = call()
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
            assert torch.equal(a, b)


def test_other_data_of_known_layouts(only_short: Call) -> None:
    first, second = inputs(T=70), inputs(T=70, seed=1)
    expected = flashdelta.forward(*second[:5], initial_state=second[5], output_final_state=True)
    only_short()
    flashdelta.forward(*first[:5], initial_state=first[5], output_final_state=True)
    got = flashdelta.forward(*second[:5], initial_state=second[5], output_final_state=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_threads_at_once(only_short: Call) -> None:
    data = [inputs(T=70, seed=seed)[:5] for seed in range(4)]
    expected = [flashdelta.forward(*d)[0] for d in data]
    flashdelta.forward(*data[0])
    only_short()

    def run(i: int) -> bool:
        return all(torch.equal(flashdelta.forward(*data[i])[0], expected[i]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_other_options_and_layouts_are_other_calls(only_short: Call) -> None:
    q, k, v, g, beta, state = inputs(T=9)
    flashdelta.forward(q, k, v, g, beta)
    only_short()
    for change in (
        {"scale": 0.5},
        {"qk_l2norm": True},
        {"output_final_state": True},
        {"initial_state": state},
        {"context_parallel": False},
        {"g": None},
        {"q": q[:, :, :1].expand_as(q)},
        {"v": v.half()},
    ):
        with pytest.raises(LongWayError):
            flashdelta.forward(**({"q": q, "k": k, "v": v, "g": g, "beta": beta} | change))


def test_gradients_need_the_long_way(only_short: Call) -> None:
    q, k, v, g, beta, _ = inputs(T=9)
    flashdelta.forward(q, k, v, g, beta)
    with torch.no_grad():
        flashdelta.forward(q, k, v, g.requires_grad_(), beta)
    only_short()
    with torch.no_grad():
        assert not flashdelta.forward(q, k, v, g, beta)[0].requires_grad
    assert not flashdelta.forward(q, k, v, g.detach(), beta)[0].requires_grad
    assert flashdelta.forward(q, k, v, g, beta)[0].requires_grad


@pytest.mark.parametrize("recompute", [False, True])
def test_training_gives_the_operators_bits(recompute: bool) -> None:
    results = []
    *main, state = (t.requires_grad_() for t in inputs(T=70))
    raw = [t.requires_grad_() for t in (torch.rand(4), torch.randn(4))]
    for operator in (ops.train, ops.forward_train):
        o, final_state = operator(*main, *raw, None, state, True, recompute, 0.5, True)[:2]
        gradients = torch.autograd.grad(o.square().sum() + final_state.square().sum(), (*main, *raw, state))
        results.append([o, final_state, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert "_Train" in str(ops.train(*main)[0].grad_fn)


def test_those_who_watch_training_see_the_operators() -> None:
    leaves = [t.requires_grad_() for t in inputs(T=9)[:5]]
    with Seen() as seen:
        flashdelta.forward(*leaves)[0].sum().backward()
    assert {"flashdelta.forward_train.default", "flashdelta.backward.default"} <= set(seen.names)
    with Seen() as seen:
        o, _ = flashdelta.forward(*leaves)
    assert "flashdelta.backward.default" not in seen.names
    o = flashdelta.forward(*leaves)[0]
    with Seen() as seen:
        o.sum().backward()
    assert "flashdelta.backward.default" in seen.names
    with torch.autograd.graph.save_on_cpu():
        o = flashdelta.forward(*leaves)[0]
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    o.sum().backward()
    assert all(torch.equal(2 * leaf.grad, gradient) for leaf, gradient in zip(leaves, expected, strict=True))


def test_conversions_need_the_long_way(only_short: Call) -> None:
    q, k, v, g, beta, state = inputs(T=9)
    backwards = torch.stack([g, g], -1)
    negative = torch.view_as_complex(backwards).conj().imag
    assert negative.is_neg()
    transposed = q.transpose(1, 3).contiguous().transpose(1, 3)
    flashdelta.forward(q, k, v, g, beta)
    flashdelta.forward(q, k, v, -negative, beta)
    only_conversions: list[Call] = [
        lambda: flashdelta.forward(transposed, k, v, g, beta),
        lambda: flashdelta.forward(q, k, v, negative, beta),
        lambda: flashdelta.forward(q, k, v, g, beta, initial_state=state.half()),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        flashdelta.forward(q, k, v, g, beta)
    for call in only_conversions:
        call()
    only_short()
    for call in only_conversions:
        with pytest.raises(LongWayError):
            call()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(LongWayError):
        flashdelta.forward(q, k, v, g, beta)


def test_tensors_that_lie_askew_need_the_long_way(only_short: Call) -> None:
    q, k, v, g, beta, _ = inputs(T=9)
    flashdelta.forward(q, k, v, g, beta)
    askew = torch.empty(v.numel() + 1)[1:].view_as(v).copy_(v)
    only_short()
    with pytest.raises(LongWayError):
        flashdelta.forward(q, k, askew, g, beta)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_those_who_watch_see_the_operator() -> None:
    q, k, v, g, beta, _ = inputs(T=9)
    call = lambda: flashdelta.forward(q, k, v, g, beta)  # noqa: E731
    expected = call()[0]
    with Seen() as seen:
        call()
    assert "flashdelta.forward.default" in seen.names
    with profile() as record:
        call()
    assert any(event.name == "flashdelta::forward" for event in record.events())
    traced = torch.jit.trace(lambda x: flashdelta.forward(x, k, v, g, beta)[0], (q,), check_trace=False)
    assert "flashdelta::forward" in str(traced.graph)
    assert torch.equal(traced(q), expected)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: flashdelta.forward(x, k, v, g, beta)[0])(q)
    assert "flashdelta.forward.default" in graph.code
    assert isinstance(flashdelta.forward(q.as_subclass(Subclass), k, v, g, beta)[0], Subclass)
    with torch.device("meta"):
        assert torch.equal(call()[0], expected)


def test_fake_and_meta_tensors_after_real_ones() -> None:
    q, k, v, g, beta, _ = inputs(T=9)
    flashdelta.forward(q, k, v, g, beta)
    mode = torch._subclasses.FakeTensorMode()
    fake = [mode.from_tensor(t) for t in (q, k, v, g, beta)]
    assert type(flashdelta.forward(*fake)[0]) is type(fake[0])
    assert flashdelta.forward(*(t.to("meta") for t in (q, k, v, g, beta)))[0].is_meta


def test_errors_of_calls_that_were_right_before() -> None:
    q, k, v, g, beta, state = inputs(T=9)
    pool, rows = torch.randn(3, *state.shape[1:]), torch.tensor([1])
    flashdelta.forward_(q, k, v, g, beta, pool, initial_index=rows, final_index=rows)
    before = pool.clone()
    with pytest.raises(ValueError, match=r"initial_index\[0, 0\] is 3"):
        flashdelta.forward_(q, k, v, g, beta, pool, initial_index=rows + 2, final_index=rows + 2)
    assert torch.equal(pool, before)
    for wrong, error, match in (
        ({"scale": 0}, ValueError, "scale is 0"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"q": None}, AttributeError, "NoneType"),
        ({"k": k[:, :8]}, ValueError, "k has size 8 in dimension 1"),
        ({"v": v.half()}, ValueError, "v is torch.float16"),
    ):
        with pytest.raises(error, match=match):
            flashdelta.forward(**({"q": q, "k": k, "v": v, "g": g, "beta": beta} | wrong))


def test_options_that_are_no_plain_values(only_short: Call) -> None:
    q, k, v, g, beta, _ = inputs(T=9)
    scale = torch.tensor(0.5)
    first = flashdelta.forward(q, k, v, g, beta, scale=scale)[0]  # type: ignore[arg-type]
    scale.mul_(2)
    second = flashdelta.forward(q, k, v, g, beta, scale=scale)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(second, 2 * first)
    array = scale.numpy()  # has no hash
    assert torch.equal(flashdelta.forward(q, k, v, g, beta, scale=array)[0], second)  # type: ignore[arg-type]


def test_layouts_are_forgotten_before_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_direct, "_known", {})
    monkeypatch.setattr("flashdelta._plan.MAX_PLANS", 3)
    for T in range(1, 9):
        q, k, v, g, beta, _ = inputs(T=T)
        expected = flashdelta.forward(q, k, v, g, beta)[0]
        assert torch.equal(flashdelta.forward(*copy.deepcopy((q, k, v, g, beta)))[0], expected)
        assert len(_direct._known) <= 3
