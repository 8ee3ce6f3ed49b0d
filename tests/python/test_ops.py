"""The operators inside PyTorch: opcheck, gradcheck, compile, autocast, checkpointing, other devices."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashdelta
from flashdelta import ops
from reference import error, gated_delta_rule, inputs


def tensors(**sizes: Any) -> tuple[Any, ...]:
    """All tensors of an operator with raw gates: q to initial_state."""
    q, k, v, g, beta, state = inputs(**sizes)
    return q, k, v, g, beta, torch.rand(4), torch.randn(4), None, state


@pytest.mark.parametrize("T", [3, 70])
def test_opcheck(T: int) -> None:
    base = tensors(B=2, T=T)
    plain = (*base[:5], None, None, None, None)
    packed = (*(t[:1] for t in base[:5]), None, None, torch.tensor([0, 1, T]), base[8])
    rows = torch.tensor([1, -1])
    for arguments in (base, plain, packed):
        torch.library.opcheck(ops.forward, (*arguments, None, True))
        torch.library.opcheck(ops.step, (*arguments, None, False, 0.5, True))
        train = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in arguments]
        for recompute in (False, True):
            torch.library.opcheck(ops.forward_train, (*train, True, recompute))
        o, _, saved = ops.forward_train(*arguments)
        wanted = [t is not None for t in (*arguments[:7], arguments[8])]
        torch.library.opcheck(ops.backward, (torch.randn_like(o), None, saved, wanted, *arguments))
    pool = torch.randn(3, 4, 32, 40)
    torch.library.opcheck(ops.step_, (*base[:8], None, rows, pool, rows))
    points = (torch.zeros(2, 4, 32, 40), torch.tensor([[0], [1]]), 64)
    torch.library.opcheck(ops.forward_, (*base[:8], None, rows, pool, rows, *points))


def test_gradcheck() -> None:
    sizes = {"T": 5, "H": 1, "HV": 2, "K": 8, "V": 8, "dtype": torch.float64}
    leaves = [t.requires_grad_() for t in (*inputs(**sizes), *torch.rand(2, 2, dtype=torch.float64))]

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta, state, A_log, dt_bias = t
        options = {"A_log": A_log, "dt_bias": dt_bias, "beta_logit": True, "qk_l2norm": True}
        return flashdelta.forward(q, k, v, g, beta, initial_state=state, output_final_state=True, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    plain = [t.requires_grad_() for t in inputs(**sizes)]
    ends = torch.tensor([0, 2, 2, 5])
    assert torch.autograd.gradcheck(lambda *t: flashdelta.chunk_gdn(*t, cu_seqlens=ends)[0], plain[:5])


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_at_a_time(wanted: int) -> None:
    everything = [t.requires_grad_() for t in inputs(T=70)]
    o, final = flashdelta.forward(*everything[:5], initial_state=everything[5], output_final_state=True)
    (o.square().sum() + final.square().sum()).backward()
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(everything)]
    o, final = flashdelta.forward(*alone[:5], initial_state=alone[5], output_final_state=True)
    (o.square().sum() + final.square().sum()).backward()
    assert torch.equal(alone[wanted].grad, everything[wanted].grad)
    assert all(t.grad is None for i, t in enumerate(alone) if i != wanted)


def test_gradient_of_the_final_state_alone() -> None:
    leaves, truths = ([t.to(kind).requires_grad_() for t in inputs(T=70)] for kind in (torch.float32, torch.float64))
    flashdelta.forward(*leaves[:5], initial_state=leaves[5], output_final_state=True)[1].sum().backward()
    gated_delta_rule(*truths[:5], initial_state=truths[5])[1].sum().backward()
    assert not leaves[0].grad.any()
    for leaf, truth in zip(leaves[1:], truths[1:], strict=True):
        assert error(leaf.grad, truth.grad) < 5e-5


def test_second_derivatives_are_refused() -> None:
    q, *others = inputs(T=5)[:5]
    (dq,) = torch.autograd.grad(flashdelta.forward(q.requires_grad_(), *others)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        dq.sum().backward()


def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    o, final = flashdelta.chunk_gated_delta_rule(2 * q, k, v, g, beta, initial_state=state, output_final_state=True)
    return o.sin(), final


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (70, 5):
        results = []
        for function in (model, compiled):
            leaves = [t.requires_grad_() for t in inputs(T=T)]
            o, final = function(*leaves)
            (o.sum() + final.sum()).backward()
            results.append([o, final, *(leaf.grad for leaf in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*leaves)[0], o)


def test_compile_with_inductor_and_in_place_step() -> None:
    torch._dynamo.reset()

    def decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor) -> Tensor:
        o = flashdelta.step_(q + 0, k, v, g, beta, pool)
        return o + pool.sum()

    *main, state = inputs(T=2)
    pools = [state.clone(), state.clone()]
    expected = decode(*main, pools[0])
    got = torch.compile(decode, fullgraph=True)(*main, pools[1])
    assert torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[1], state)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_q_k_v_alone(dtype: torch.dtype) -> None:
    q, k, v, g, beta, state = inputs(T=70)
    with torch.autocast("cpu", dtype):
        o, final = flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        mixed, _ = flashdelta.chunk_gated_delta_rule(q.half(), k, v, g, beta)
    expected = flashdelta.forward(
        q.to(dtype), k.to(dtype), v.to(dtype), g, beta, initial_state=state, output_final_state=True
    )
    assert o.dtype == dtype
    assert mixed.dtype == torch.float16
    assert torch.equal(o, expected[0])
    assert torch.equal(final, expected[1])
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        flashdelta.chunk_gated_delta_rule(leaf, k, v, g, beta)[0].sum().backward()
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    results = []
    for function in (model, lambda *t: checkpoint(model, *t, use_reentrant=reentrant)):
        leaves = [t.requires_grad_() for t in inputs(T=70)]
        o, final = function(*leaves)
        (o.sum() + final.sum()).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_limit_on_the_workspace_changes_no_bit() -> None:
    results = []
    for limit in (None, 1 << 20):
        leaves = [t.requires_grad_() for t in inputs(T=700)]
        o, final = flashdelta.forward(*leaves[:-1], initial_state=leaves[-1], output_final_state=True, workspace_limit=limit)
        (o.sum() + final.sum()).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="workspace_limit is 0"):
        flashdelta.forward(*inputs(T=1)[:-1], workspace_limit=0)


def test_meta_tensors_have_shapes_alone() -> None:
    *main, state = (t.to("meta") for t in inputs(T=70, dtype=torch.bfloat16))
    o, final = flashdelta.chunk_gated_delta_rule(*main, initial_state=state, output_final_state=True)
    assert o.is_meta
    assert (o.shape, o.dtype) == ((1, 70, 4, 40), torch.bfloat16)
    assert (final.shape, final.dtype) == ((1, 4, 32, 40), torch.float32)


def test_operators_name_their_options() -> None:
    for operator in (ops.forward, ops.forward_train, ops.backward, ops.forward_, ops.step, ops.step_):
        names = [argument.name for argument in operator._schema.arguments]
        assert names[-10:] == list(ops.Options._fields[:10])
