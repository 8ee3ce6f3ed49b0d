"""transformers' Gated DeltaNet models on flashdelta, against the same models on transformers' own PyTorch functions."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from flashdelta.integrations import transformers as integration  # noqa: E402

NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn")
MODELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")


def modeling(model: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def plain(module: ModuleType) -> dict[str, Any]:
    """transformers' own PyTorch functions, whatever other package its decorators found."""
    return {name: inspect.unwrap(vars(module)[name]) for name in NAMES}


@pytest.fixture(autouse=True)
def stock() -> Iterator[None]:
    """Each test starts from transformers' PyTorch functions and leaves the modules as it found them."""
    before = {model: {name: vars(modeling(model))[name] for name in NAMES} for model in MODELS}
    for model in MODELS:
        vars(modeling(model)).update(plain(modeling(model)))
    yield
    integration.disable()
    for model in MODELS:
        vars(modeling(model)).update(before[model])


def make_model(model: str, **changes: Any) -> Any:
    """A model of four layers, three of them Gated DeltaNet, with random weights and 2/4 heads of 16 x 24."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    if model in ("qwen3_next", "qwen3_5_moe"):
        # every expert sees every token: with fewer, a rounding difference could send a token to another one
        sizes |= {
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
    names = {
        "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
        "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
        "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    }[model]
    torch.manual_seed(1)
    config = getattr(transformers, names[0])(**(sizes | changes))
    made = getattr(transformers, names[1])(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # initial weights are so small that every layer would be nearly the identity
            if name.endswith("A_log"):
                parameter.uniform_(-4, 0)  # heads that remember; most initial ones forget within a token
            if name.endswith("conv1d.weight"):
                parameter.normal_(0, 0.5)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(2))


def assert_close(ours: Tensor, theirs: Tensor, limit: float) -> None:
    """The largest difference is at most `limit` times the rms of `theirs`; NaN fails."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.square().mean().sqrt()
    assert error <= limit, f"{error:.2e} > {limit:.0e} of the rms"


def gradients(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False, **inputs)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", MODELS)
def test_logits_and_every_gradient(model: str) -> None:
    made, ids = make_model(model), tokens(2, 131)
    logits, wanted = gradients(made, ids)
    integration.enable(strict=True)
    ours, got = gradients(made, ids)
    assert_close(ours, logits, 1e-4)
    assert got.keys() == wanted.keys()
    assert len(got) == len(dict(made.named_parameters()))
    for name, gradient in got.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)
        assert error <= 1e-3, f"{name}: {error:.2e}"


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_logits(model: str) -> None:
    ids = tokens(2, 131)
    exact = make_model(model)(ids, use_cache=False).logits
    made = make_model(model).to(torch.bfloat16)
    theirs = made(ids, use_cache=False).logits.float()
    integration.enable(strict=True)
    ours = made(ids, use_cache=False).logits.float()
    # bf16 layers turn any rounding difference into an error of bf16's own size: ours may be as far from fp32 as theirs
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()
    assert (ours - theirs).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("model", MODELS)
def test_greedy_generation(model: str) -> None:
    made, ids = make_model(model), tokens(2, 70)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    theirs = made.generate(ids, **options)
    integration.enable(strict=True)
    ours = made.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), 1e-4)
    assert len(set(ours.sequences[:, 70:].flatten().tolist())) > 3, "the generated tokens must say something"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    made, ids = make_model("qwen3_next"), tokens(3, 90)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 66)):
        mask[row, slice(padding) if side == "left" else slice(90 - padding, 90)] = 0
    ids = ids * mask
    theirs = made(ids, attention_mask=mask, use_cache=False).logits
    integration.enable(strict=True)
    ours = made(ids, attention_mask=mask, use_cache=False).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()], 1e-4)
    if side == "left":
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        generated = made.generate(ids, **options)
        integration.disable()
        assert torch.equal(generated, made.generate(ids, **options))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("how", ["cu_seq_lens_q", "seq_idx"])
def test_packed_input_equals_each_sequence_alone(model: str, how: str) -> None:
    made, lengths = make_model(model), [5, 64, 1, 70, 2]
    parts = [tokens(1, 200)[:, sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    if how == "cu_seq_lens_q":
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        packing: dict[str, Any] = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 70, "max_length_k": 70}
    else:
        packing = {"seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()}

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[0].float(), ids[0], reduction="sum")

    alone = [made(part, use_cache=False).logits for part in parts]
    sum(loss(logits, part) for logits, part in zip(alone, parts, strict=True)).backward()
    wanted = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()

    integration.enable(strict=True)
    packed = torch.cat(parts, 1)
    logits = made(packed, position_ids=positions, use_cache=False, **packing).logits
    loss(logits, packed).backward()
    for ours, theirs in zip(logits.split(lengths, 1), alone, strict=True):
        assert_close(ours, theirs, 1e-4)
    for name, parameter in made.named_parameters():
        error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
        assert error <= 1e-3, f"{name}: {error:.2e}"


def test_packed_prompt_shorter_than_the_filter() -> None:
    x, weight = torch.randn(1, 8, 3), torch.randn(8, 4)
    convolve = modeling("qwen3_next").causal_conv1d_fn
    alone = torch.cat([convolve(x[:, :, :1], weight), convolve(x[:, :, 1:], weight)], 2)
    integration.enable()
    convolve, ends = modeling("qwen3_next").causal_conv1d_fn, torch.tensor([0, 1, 3], dtype=torch.int32)
    assert_close(convolve(x, weight, cu_seq_lens_q=ends), alone, 1e-6)
    padded_by_a_cache = torch.nn.functional.pad(x, (1, 0))
    assert_close(convolve(padded_by_a_cache, weight, cu_seq_lens_q=ends)[:, :, 1:], alone, 1e-6)


def test_the_flattening_collator_of_transformers() -> None:
    made = make_model("qwen3_next")
    features = [{"input_ids": tokens(40)[a:b]} for a, b in ((0, 9), (9, 40))]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator(features)
    alone = torch.cat([made(f["input_ids"][None], use_cache=False).logits for f in features], 1)
    integration.enable(strict=True)
    batch.pop("labels")
    assert_close(made(**batch, use_cache=False).logits, alone, 1e-4)


def test_a_prompt_in_two_calls() -> None:
    made, ids = make_model("qwen3_next"), tokens(2, 150)
    whole = made(ids, use_cache=False).logits
    integration.enable(strict=True)
    first = made(ids[:, :80], use_cache=True)
    second = made(ids[:, 80:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], 1), whole, 1e-4)


def test_enable_is_idempotent_and_disable_restores_the_same_objects() -> None:
    before = {model: {name: vars(modeling(model))[name] for name in NAMES} for model in MODELS}
    names = integration.enable()
    assert {modeling(model).__name__ for model in MODELS} <= set(names)
    once = {model: {name: vars(modeling(model))[name] for name in NAMES} for model in MODELS}
    assert integration.enable(strict=True) == names
    for model in MODELS:
        for name in NAMES:
            assert vars(modeling(model))[name] is once[model][name] is not before[model][name]
            signature, original = (
                inspect.signature(once[model][name], follow_wrapped=False),
                inspect.signature(before[model][name]),
            )
            shared = [p for p in original.parameters if p != "kwargs"]
            assert list(signature.parameters)[: len(shared)] == shared
    integration.disable()
    integration.disable()
    for model in MODELS:
        for name in NAMES:
            assert vars(modeling(model))[name] is before[model][name]


def test_a_model_made_after_enable_runs_on_flashdelta(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = integration.chunk_gated_delta_rule
    monkeypatch.setattr(integration, "chunk_gated_delta_rule", lambda *a, **k: calls.append(1) or original(*a, **k))
    integration.enable(strict=True)
    make_model("qwen3_next")(tokens(1, 20))
    assert len(calls) == 3


def test_an_unsupported_head_dim_falls_back_with_one_warning() -> None:
    made, ids = make_model("qwen3_next", linear_key_head_dim=12), tokens(2, 40)
    theirs = made(ids, use_cache=False).logits
    integration.enable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = made(ids, use_cache=False).logits
        made(ids, use_cache=False)
    assert torch.equal(ours, theirs)
    about = [w for w in caught if "flashdelta" in str(w.message)]
    assert len(about) == 1
    assert about[0].category is RuntimeWarning
    integration.enable(strict=True)
    with pytest.raises(NotImplementedError, match="torch_chunk_gated_delta_rule"):
        made(ids, use_cache=False)


def test_exporting_uses_transformers_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ids = make_model("qwen3_next").requires_grad_(False), tokens(1, 20)
    monkeypatch.setattr(integration, "is_torchdynamo_exporting", lambda: True)
    theirs = made(ids, use_cache=False).logits
    integration.enable()
    with pytest.warns(RuntimeWarning, match="being exported"):
        assert torch.equal(made(ids, use_cache=False).logits, theirs)


def test_keywords_nobody_knows_are_not_ignored() -> None:
    integration.enable()
    function = modeling("qwen3_next").torch_chunk_gated_delta_rule
    q, v, g = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16), -torch.rand(1, 9, 2)
    with pytest.warns(RuntimeWarning, match="unknown keyword window"):
        function(q, q, v, g=g, beta=-g, window=3)
    integration.enable(strict=True)
    with pytest.raises(NotImplementedError, match="unknown keyword window"):
        function(q, q, v, g=g, beta=-g, window=3)


def test_every_keyword_transformers_may_hand_on_is_known() -> None:
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils import TransformersKwargs

    handed_on = set(TransformersKwargs.__annotations__) | set(FlashAttentionKwargs.__annotations__)
    assert handed_on <= integration.IGNORED_KEYWORDS


def test_packed_rows_are_refused() -> None:
    integration.enable(strict=True)
    convolution = modeling("qwen3_next").causal_conv1d_fn
    with pytest.raises(ValueError, match="batch size 1, got 2"):
        convolution(torch.randn(2, 8, 10), torch.randn(8, 4), cu_seq_lens_q=torch.tensor([0, 4, 10]))
    with pytest.raises(ValueError, match=r"seq_idx has shape \[1, 9\]"):
        modeling("qwen3_next").torch_chunk_gated_delta_rule(
            *(torch.randn(1, 10, 2, 16) for _ in range(3)),
            g=torch.zeros(1, 10, 2),
            beta=torch.ones(1, 10, 2),
            seq_idx=torch.zeros(1, 9, dtype=torch.int32),
        )
