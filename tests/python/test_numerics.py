"""Results and gradients against the float64 recurrence: every option, dtype and way of calling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashdelta
from reference import error, gated_delta_rule, inputs

#: limits of the relative L2 error per (sequence, head): forward, backward
LIMITS = {
    torch.float32: (5e-6, 5e-5),
    torch.bfloat16: (2.5e-3, 4e-3),
    torch.float16: (4e-4, 1e-3),
    torch.float64: (1e-12, 1e-12),
}


def compare(tensors: tuple[Tensor, ...], dtype: torch.dtype, **options: object) -> None:
    """Forward and backward of `flashdelta.forward` against the reference."""
    *main, state = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (*main, state)]
    truths = [t.detach().double().requires_grad_() for t in (*main, state)]
    extra = {name: value for name, value in options.items() if isinstance(value, Tensor) and value.is_floating_point()}
    plain = {name: value for name, value in options.items() if name not in extra}
    got_extra = {name: t.clone().requires_grad_() for name, t in extra.items()}
    true_extra = {name: t.double().requires_grad_() for name, t in extra.items()}
    o, final = flashdelta.forward(*leaves[:-1], initial_state=leaves[-1], output_final_state=True, **plain, **got_extra)
    with torch.no_grad():
        quiet, quiet_final = flashdelta.forward(
            *leaves[:-1], initial_state=leaves[-1], output_final_state=True, **plain, **got_extra
        )
    assert torch.equal(o, quiet)
    assert torch.equal(final, quiet_final)
    names = ("threads", "context_parallel", "recompute", "backend")
    known = {name: value for name, value in plain.items() if name not in names}
    expected, expected_final = gated_delta_rule(*truths[:-1], initial_state=truths[-1], **known, **true_extra)
    forward, backward = LIMITS[dtype]
    assert o.dtype == dtype
    assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(o, expected, 2) <= forward
    assert error(final, expected_final, 1) <= forward
    do, dstate = torch.randn_like(o), torch.randn_like(final)
    torch.autograd.backward([o, final], [do, dstate])
    torch.autograd.backward([expected, expected_final], [do.double(), dstate.double()])
    for i, (leaf, truth) in enumerate(zip(leaves, truths, strict=True)):
        assert leaf.grad.dtype == leaf.dtype
        assert error(leaf.grad, truth.grad, 2 if i < 5 else 1) <= backward, f"gradient {i}"
    for name, leaf in got_extra.items():
        assert leaf.grad.dtype == leaf.dtype
        assert error(leaf.grad, true_extra[name].grad) <= max(backward, 1e-5 if leaf.dtype == torch.float32 else 4e-3), name


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths(dtype: torch.dtype, T: int) -> None:
    compare(inputs(B=2, T=T, dtype=dtype), dtype)


@pytest.mark.parametrize("recompute", [False, True])
def test_raw_gates_logits_and_norm(recompute: bool) -> None:
    q, k, v, g, beta, state = inputs(T=70)
    compare(
        (3 * q, 0.2 * k, v, torch.randn_like(g), torch.randn_like(beta), state),
        torch.float32,
        A_log=torch.rand(4),
        dt_bias=torch.randn(4).bfloat16(),
        beta_logit=True,
        allow_neg_eigval=True,
        qk_l2norm=True,
        recompute=recompute,
    )


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_with_empty_ones_and_padding(index: torch.dtype) -> None:
    ends = torch.tensor([0, 5, 5, 70, 135, 136, 136], dtype=index)
    compare(inputs(T=150, N=6), torch.float32, cu_seqlens=ends)


def test_state_v_first_and_scale() -> None:
    *main, state = inputs()
    compare((*main, state.transpose(-1, -2).contiguous()), torch.float32, state_v_first=True, scale=0.3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_by_name(backend: str) -> None:
    compare(inputs(), torch.float32, backend=backend)


@pytest.mark.parametrize("context_parallel", ["auto", True, False])
def test_context_parallel(context_parallel: object) -> None:
    compare(inputs(T=700, H=1, HV=1), torch.float32, context_parallel=context_parallel)


def test_hard_data() -> None:
    q, k, v, g, beta, state = inputs(T=130)
    same = k[:, :1].expand_as(k).contiguous()
    forward = 10 * LIMITS[torch.float32][0]
    for data in (
        (q, same, v, g, torch.ones_like(beta)),
        (q, k, v, torch.full_like(g, -20), beta),
        (q, k, v, 0 * g, 0 * beta),
    ):
        o, final = flashdelta.forward(*data, initial_state=state, output_final_state=True)
        expected, expected_final = gated_delta_rule(*data, initial_state=state)
        assert error(o, expected, 2) <= forward
        assert error(final, expected_final, 1) <= forward


def test_no_tokens_pass_the_state_through() -> None:
    *main, state = inputs(T=0, B=2)
    o, final = flashdelta.chunk_gated_delta_rule(*main, initial_state=state, output_final_state=True)
    assert o.shape == (2, 0, 4, 40)
    assert torch.equal(final, state)
    o, final = flashdelta.fused_recurrent_gdn(*main[:4], beta=main[4], output_final_state=True)
    assert torch.equal(final, torch.zeros(2, 4, 32, 40))


def test_threads_do_not_change_a_bit() -> None:
    *main, state = inputs(T=200, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in main]
            o, final = flashdelta.forward(*leaves, initial_state=state, output_final_state=True)
            (o.float().square().sum() + final.sum()).backward()
            results.append([o, final, *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@given(
    B=st.integers(1, 3),
    T=st.integers(0, 140),
    H=st.integers(1, 3),
    G=st.integers(1, 3),
    K=st.integers(1, 5),
    V=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    gates=st.sampled_from([torch.float32, torch.bfloat16]),
    packed=st.booleans(),
    l2norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_shapes(
    B: int,
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    gates: torch.dtype,
    packed: bool,
    l2norm: bool,
    seed: int,
) -> None:
    N = B
    if packed:
        B = 1
        cuts = torch.randint(0, T + 1, (N,), generator=torch.Generator().manual_seed(seed)).sort().values
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
    *main, state = inputs(B, T, H, G * H, 8 * K, 8 * V, dtype, seed, N, gates)
    options = {"initial_state": state, "cu_seqlens": ends if packed else None}
    expected, expected_final = gated_delta_rule(*main, **options, qk_l2norm=l2norm)
    chunk = flashdelta.chunk_gdn(*main, **options, output_final_state=True, use_qk_l2norm_in_kernel=l2norm)
    step = flashdelta.step(*main, **options, output_final_state=True, qk_l2norm=l2norm)
    for o, final in (chunk, step):
        assert error(o, expected, 2) <= LIMITS[dtype][0]
        assert error(final, expected_final, 1) <= LIMITS[torch.float32][0]
