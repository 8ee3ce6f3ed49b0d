"""flashdelta as a backend of flash-linear-attention. FLA's own kernels need Triton and a GPU; its registry does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("fla.backends", reason="FLA 0.6 or later is not installed")
from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_chunk
from fla.ops.gated_delta_rule import naive_recurrent_gated_delta_rule

import flashdelta
from flashdelta.integrations import fla as integration


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    integration.enable()
    yield
    integration.disable()


def inputs(
    B: int = 2, T: int = 70, H: int = 2, HV: int = 2, K: int = 16, V: int = 24, dtype: torch.dtype = torch.float32
) -> Any:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, HV, V)
    g, beta = F.logsigmoid(torch.randn(B, T, HV)), torch.rand(B, T, HV)
    return q.to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype), g, beta


def test_calls_of_fla_are_served_by_flashdelta() -> None:
    q, k, v, g, beta = inputs()
    state = torch.randn(2, 2, 16, 24)
    o, final = fla_chunk(q, k, v, g, beta, initial_state=state, output_final_state=True)
    expected, expected_final = naive_recurrent_gated_delta_rule(
        q, k, v, beta, g, initial_state=state, output_final_state=True
    )
    assert (o - expected).norm() <= 1e-5 * expected.norm()
    assert (final - expected_final).norm() <= 1e-5 * expected_final.norm()
    ours, our_final = flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    assert torch.equal(o, ours)
    assert torch.equal(final, our_final)


def test_gradients_arrive() -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    fla_chunk(*leaves)[0].square().sum().backward()
    got = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    q, k, v, g, beta = leaves
    naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0].square().sum().backward()
    for gradient, x in zip(got, leaves, strict=True):
        assert (gradient - x.grad).norm() <= 1e-4 * x.grad.norm()


def test_options_reach_flashdelta() -> None:
    q, k, v, a, b = inputs(B=1, T=40, HV=4)
    A_log, dt_bias, ends = torch.randn(4), torch.randn(4), torch.tensor([0, 7, 40])
    options: dict[str, Any] = {
        "scale": 0.5,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True,
        "state_v_first": True,
        "cu_seqlens": ends,
        "use_gate_in_kernel": True,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "chunk_size": 32,
    }
    o, final = fla_chunk(q, k, v, a, b, **options)
    expected, expected_final = flashdelta.chunk_gated_delta_rule(q, k, v, a, b, **options)
    assert final.shape == (2, 4, 24, 16)
    assert torch.equal(o, expected)
    assert torch.equal(final, expected_final)


def test_enable_twice_registers_once_and_disable_takes_effect(caplog: pytest.LogCaptureFixture) -> None:
    from fla.backends import _operation_registries

    integration.enable()
    registry = _operation_registries["gated_delta_rule"]
    names = [backend.backend_type for backend in registry._get_sorted_backends()]
    assert names.count("flashdelta") == 1
    assert registry.get_active().backend_type == "flashdelta"
    integration.disable()
    active = registry.get_active()
    assert active is None or active.backend_type != "flashdelta"


@pytest.mark.parametrize(("change", "reason"), [({"K": 12}, "12 x 24"), ({"dtype": torch.float64}, "float64")])
def test_the_verifier_refuses_what_the_planner_refuses(change: dict[str, Any], reason: str) -> None:
    from fla.backends import _operation_registries

    backend = _operation_registries["gated_delta_rule"]._backends["flashdelta"]
    assert backend.verify("chunk_gated_delta_rule", *inputs()) == (True, None)
    accepted, why = backend.verify("chunk_gated_delta_rule", *inputs(**change))
    assert not accepted
    assert reason in str(why)
    accepted, why = backend.verify("chunk_gated_delta_rule", *inputs(), cp_context=object())
    assert not accepted
    assert "context parallelism" in str(why)


def test_the_layer_of_fla(caplog: pytest.LogCaptureFixture) -> None:
    if not torch.cuda.is_available():
        pytest.skip("fla.layers.GatedDeltaNet needs Triton's convolution and norm kernels: no GPU here")
    from fla.layers import GatedDeltaNet

    layer = GatedDeltaNet(hidden_size=256, head_dim=128, num_heads=2).cuda().bfloat16()
    with caplog.at_level(logging.INFO, logger="fla.backends"):
        output = layer(torch.randn(1, 256, 256, device="cuda", dtype=torch.bfloat16))[0]
    assert output.isfinite().all()
