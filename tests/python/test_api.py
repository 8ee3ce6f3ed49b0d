"""The functions as users call them: FLA's signatures and rules, errors, any memory layout, pools of states."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashdelta
from reference import error, gated_delta_rule, inputs

TABLE = json.loads((Path(__file__).parent / "fla_signatures.json").read_text())
FLA_FUNCTIONS = (flashdelta.chunk_gated_delta_rule, flashdelta.fused_recurrent_gated_delta_rule)


def signature(function: Any) -> list[list[str]]:
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return [[p.name, p.kind.name, "" if p.default is p.empty else repr(p.default)] for p in parameters]


@pytest.mark.parametrize("name", list(TABLE))
def test_signatures_are_flas(name: str) -> None:
    assert signature(getattr(flashdelta, name)) == TABLE[name]


@pytest.mark.parametrize("name", list(TABLE))
def test_the_table_is_flas(name: str) -> None:
    pytest.importorskip("fla", reason="FLA is not installed")
    module = pytest.importorskip("fla.ops.gated_delta_rule")
    assert signature(getattr(module, name)) == TABLE[name]


def test_aliases() -> None:
    assert flashdelta.chunk_gdn is flashdelta.chunk_gated_delta_rule
    assert flashdelta.fused_recurrent_gdn is flashdelta.fused_recurrent_gated_delta_rule


def test_hints_change_nothing() -> None:
    q, k, v, g, beta, state = inputs()
    o, none = flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state)
    assert none is None
    hints = {"chunk_size": 32, "head_first": False, "cu_seqlens_cpu": None, "chunk_indices": torch.zeros(1)}
    again, _ = flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, **hints)
    assert torch.equal(o, again)
    v_first = state.transpose(-1, -2).contiguous()
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        again, _ = flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=v_first, transpose_state_layout=True)
    assert error(again, o) < 1e-6


@pytest.mark.parametrize("T", [3, 100])
def test_absent_gate_and_write_strength(T: int) -> None:
    q, k, v, *_ = inputs(T=T)
    expected, _ = gated_delta_rule(q, k, v)
    for function in FLA_FUNCTIONS:
        assert error(function(q, k, v, g=None, beta=None)[0], expected, 2) < 5e-6


def test_raw_gates_through_flas_names() -> None:
    q, k, v, g, beta, _ = inputs(T=5)
    A_log, dt_bias = torch.rand(4), torch.randn(4)
    expected, _ = gated_delta_rule(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, beta_logit=True, qk_l2norm=True)
    options = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    options |= {"use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}
    for function in FLA_FUNCTIONS:
        assert error(function(q, k, v, g=g, beta=beta, **options)[0], expected, 2) < 5e-6


@pytest.mark.parametrize("function", FLA_FUNCTIONS)
@pytest.mark.parametrize("T", [3, 70])
def test_inputs_are_never_written(function: Any, T: int) -> None:
    q, k, v, g, beta, state = inputs(T=T)
    copies = [t.clone() for t in (q, k, v, g, beta, state)]
    _, final = function(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    assert final.data_ptr() != state.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, g, beta, state), copies, strict=True))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", FLA_FUNCTIONS)
def test_final_state_is_fp32(function: Any, state_dtype: torch.dtype) -> None:
    q, k, v, g, beta, state = inputs(T=4, dtype=torch.bfloat16)
    state = state.to(state_dtype)
    o, final = function(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    _, expected = gated_delta_rule(q, k, v, g, beta, initial_state=state)
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert error(final, expected, 1) < 5e-6


def expanded(t: Tensor) -> Tensor:
    return t.flatten()[:1].view([1] * t.dim()).expand_as(t)


def by_token(t: Tensor) -> Tensor:
    """The same tensor with the token as its innermost dimension, as a convolution leaves it."""
    return t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def test_strided_inputs() -> None:
    q, k, v, g, beta, state = inputs(B=2, T=7, H=16, HV=16, K=8, V=8)
    assert by_token(q).stride() == (896, 1, 56, 7)
    packed = torch.cat([q, k], -1)
    padded = torch.empty(2, 16, 8, 3, 8)
    padded[..., 1, :] = state
    layouts = [
        (by_token(q), by_token(k), by_token(v), g, beta, state),
        (packed[..., :8], packed[..., 8:], v, torch.stack([g, beta], -1)[..., 0], torch.stack([g, beta], -1)[..., 1], state),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, g.mT.contiguous().mT, beta, padded[..., 1, :]),
        (q, k, expanded(v), expanded(g), expanded(beta), state),
        (q[:, :, :1].expand_as(q), k, v, g[:, :, :1].expand_as(g), beta, state.transpose(-1, -2).contiguous().mT),
    ]
    for layout in layouts:
        leaves = [t.detach().requires_grad_() for t in layout]
        truths = [t.detach().double().requires_grad_() for t in layout]
        o, _ = flashdelta.chunk_gated_delta_rule(*leaves[:5], initial_state=leaves[5])
        expected, _ = gated_delta_rule(*truths[:5], initial_state=truths[5])
        o.sum().backward()  # its gradient has strides 0
        expected.sum().backward()
        assert error(o, expected, 2) < 5e-6
        for leaf, truth in zip(leaves, truths, strict=True):
            assert error(leaf.grad, truth.grad) < 5e-5
        step, _ = flashdelta.fused_recurrent_gdn(*layout[:4], beta=layout[4], initial_state=layout[5])
        assert error(step, expected, 2) < 5e-6


def test_one_token_of_any_strides() -> None:
    q, k, v, g, beta, state = inputs(T=1)

    def odd(t: Tensor) -> Tensor:
        stride = list(t.contiguous().stride())
        return t.as_strided(t.shape, [1, 7, *stride[2:]])

    expected, _ = gated_delta_rule(q, k, v, g, beta, initial_state=state)
    for function in FLA_FUNCTIONS:
        o, _ = function(odd(q), odd(k), odd(v), g=odd(g), beta=odd(beta), initial_state=state)
        assert error(o, expected, 2) < 5e-6


def test_pool_of_states() -> None:
    q, k, v, g, beta, state = inputs(B=3, T=2)
    pool = torch.randn(6, 4, 2, 32, 40)[:, :, 0]
    before = pool.clone()
    read, write = torch.tensor([4, -1, 2]), torch.tensor([4, 5, -1])
    starts = torch.where((read >= 0).view(-1, 1, 1, 1), pool[read.clamp(min=0)], 0)
    expected, final = gated_delta_rule(q, k, v, g, beta, initial_state=starts)
    for function in (flashdelta.step_, flashdelta.forward_):
        pool.copy_(before)
        o = function(q, k, v, g, beta, pool, initial_index=read, final_index=write)
        assert error(o, expected, 2) < 5e-6
        assert error(pool[[4, 5]], final[:2], 1) < 5e-6
        assert torch.equal(pool[:4], before[:4])
    leaf = before.clone().requires_grad_()
    o, _ = flashdelta.forward(q, k, v, g, beta, initial_state=leaf, initial_index=read)
    assert error(o, expected, 2) < 5e-6
    o.sum().backward()
    assert leaf.grad[[2, 4]].abs().sum() > 0
    assert leaf.grad[[0, 1, 3, 5]].abs().sum() == 0


def test_speculative_decoding_and_checkpoints() -> None:
    q, k, v, g, beta, state = inputs(B=2, T=3)
    pool = torch.zeros(8, 4, 32, 40)
    pool[:2] = state
    slots = torch.tensor([[2, 3, 4], [5, 6, -1]], dtype=torch.int32)
    first = torch.tensor([0, 1], dtype=torch.int32)
    flashdelta.step_(q, k, v, g, beta, pool, initial_index=first.view(2, 1), final_index=slots)
    for t, row in ((0, 2), (1, 3), (2, 4)):
        _, expected = gated_delta_rule(*(x[:1, : t + 1] for x in (q, k, v, g, beta)), initial_state=state[:1])
        assert error(pool[row : row + 1], expected, 1) < 5e-6
    accepted = torch.tensor([2, 1], dtype=torch.int32)
    start = pool[[3, 5]].clone()
    last = torch.tensor([7, -1], dtype=torch.int32)
    o = flashdelta.step_(q, k, v, g, beta, pool, initial_index=slots, final_index=last, accepted=accepted)
    expected, final = gated_delta_rule(q, k, v, g, beta, initial_state=start)
    assert error(o, expected, 2) < 5e-6
    assert error(pool[7:], final[:1], 1) < 5e-6
    q, k, v, g, beta, _ = inputs(T=150)
    pool, rows = torch.zeros(2, 4, 32, 40), torch.tensor([[1, 0]])
    flashdelta.forward_(q, k, v, g, beta, None, checkpoints=pool, checkpoint_index=rows, checkpoint_interval=64)
    for row, t in ((1, 64), (0, 128)):
        _, expected = gated_delta_rule(*(x[:, :t] for x in (q, k, v, g, beta)))
        assert error(pool[row : row + 1], expected, 1) < 5e-6


def call(change: dict[str, Any], function: Any = flashdelta.chunk_gated_delta_rule) -> None:
    names = ("q", "k", "v", "g", "beta", "initial_state")
    function(**(dict(zip(names, inputs(B=2, T=10), strict=True)) | change))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": torch.zeros(2, 10, 3, 32)}, ValueError, "k has 3 heads; must have q's 2"),
    ({"k": torch.zeros(2, 9, 2, 32)}, ValueError, r"k has size 9 in dimension 1 \(T\); must be 10"),
    ({"v": torch.zeros(2, 10, 3, 40)}, ValueError, r"v has 3 heads \(HV\); must be a multiple of q's 2"),
    ({"v": torch.zeros(2, 10, 40)}, ValueError, r"must be \[B, T, H, K\]"),
    ({"v": torch.zeros(2, 10, 4, 40).bfloat16()}, ValueError, "v is torch.bfloat16; must be torch.float32, as q"),
    ({"g": torch.zeros(2, 10, 5)}, ValueError, r"g has size 5 in dimension 2 \(HV\); must be 4"),
    ({"g": torch.zeros(2, 10, 4, dtype=torch.int32)}, ValueError, "g is torch.int32; must be one of"),
    ({"beta": torch.zeros(2, 10, 4, 40)}, ValueError, r"beta has shape \[2, 10, 4, 40\]; must be \[B, T, HV\]"),
    ({"initial_state": torch.zeros(1, 4, 32, 40)}, ValueError, r"initial_state has shape \[1, 4, 32, 40\]; must be \[N"),
    ({"initial_state": torch.zeros(2, 4, 40, 32)}, ValueError, r"must be \[N, HV, K, V\] = \[2, 4, 32, 40\]"),
    ({"cu_seqlens": torch.tensor([0, 10])}, ValueError, r"q has batch size 2 \(B\); must be 1"),
    ({"allow_neg_eigval": True}, ValueError, "needs use_beta_sigmoid_in_kernel=True"),
    ({"cp_context": object()}, ValueError, "cp_context is given; must be None"),
    ({"head_first": True}, ValueError, "head_first=True is not supported"),
    ({"use_gate_in_kernel": True}, ValueError, "A_log is None"),
    ({"scale": 0.0}, ValueError, "scale is 0"),
    ({"window": 3}, TypeError, "unexpected keyword argument 'window'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(change)


def test_wrong_calls_of_the_other_functions() -> None:
    for name in ("gk", "gv"):
        with pytest.raises(ValueError, match=f"{name} is given; must be None"):
            call({name: torch.zeros(1)}, flashdelta.fused_recurrent_gated_delta_rule)
    with pytest.raises(ValueError, match="backend is 'tpu'; must be one of 'auto', 'reference'"):
        call({"backend": "tpu"}, flashdelta.forward)
    with pytest.raises(NotImplementedError, match="no backend serves this problem"):
        call({"backend": "sm90"}, flashdelta.forward)
    with pytest.raises(ValueError, match=r"cu_seqlens\[1\] is 11; must not be above T, 10"):
        q, k, v, g, beta, _ = inputs(T=10)
        flashdelta.forward(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 11]))
    state = torch.zeros(2, 4, 32, 40)
    rows = {"initial_state": None, "final_index": torch.tensor([1, 1]), "state": state}
    with pytest.raises(ValueError, match="row 1 of final_state is written twice"):
        call(rows, flashdelta.step_)
    with pytest.raises(ValueError, match="final_state repeats one element"):
        call(rows | {"state": torch.zeros(1).expand(2, 4, 32, 40)}, flashdelta.step_)
    assert not state.any()
