"""Hugging Face's Gated DeltaNet models on flashdelta.

    import flashdelta.integrations.transformers
    flashdelta.integrations.transformers.enable()

The modeling modules of Qwen3-Next, Qwen3.5, Qwen3.5-MoE and their relatives look three functions up in their own globals
each time a layer runs: the chunked rule, the recurrent rule and the causal convolution before them. `enable()` puts
functions of the same signature there, so it works for models made before and after it; `disable()` puts the very same
objects back.

Packed input is kept apart by `cu_seq_lens_q` or `seq_idx`, in the convolution as in the rule. Packing that shows in
`position_ids` alone never reaches these layers and cannot be seen here. `seq_idx` alone costs a search for its boundaries in
every layer (a synchronisation on a GPU): pass `cu_seq_lens_q` where there is a choice.

What flashdelta cannot serve (`torch.export`, a device, element type or head dim without a fast backend, an unknown keyword)
runs on what was there before, with one warning per reason; `enable(strict=True)` raises NotImplementedError instead.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_torchdynamo_exporting  # type: ignore[attr-defined, import-not-found, unused-ignore]

from .. import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from ._planner import refusal

Function = Callable[..., Any]

#: Models of transformers that have the functions; others are found if their modeling module is loaded when `enable()` runs.
MODELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid")

#: Keywords that reach the functions only because a model hands on all it got; they do not concern the rule.
IGNORED_KEYWORDS = frozenset(
    {
        "attention_mask",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)

_strict = False
_warned: set[str] = set()
_originals: dict[str, dict[str, Function]] = {}  # by module name, then by function name


def enable(strict: bool = False) -> tuple[str, ...]:
    """Makes every Gated DeltaNet model of transformers use flashdelta; a second call only changes `strict`.

    Args:
        strict: raise NotImplementedError where the default is to warn and run the function that was there before.

    Returns:
        The names of the modeling modules that now use flashdelta.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: the installed transformers has none of these models.
    """
    global _strict
    _strict = strict
    for module in _modeling_modules():
        saved = _originals.setdefault(module.__name__, {})
        for name, make in _REPLACEMENTS.items():
            if name in vars(module) and name not in saved:
                saved[name] = vars(module)[name]
                setattr(module, name, make(saved[name]))
    if not _originals:
        raise RuntimeError(f"this transformers has none of the models {', '.join(MODELS)}; version 5 or later is needed")
    return tuple(_originals)


def disable() -> None:
    """Puts the functions that `enable()` replaced back, the same objects; without an `enable()` before it does nothing."""
    for module_name, saved in _originals.items():
        for name, original in saved.items():
            setattr(sys.modules[module_name], name, original)
    _originals.clear()
    _warned.clear()


def _modeling_modules() -> Iterator[ModuleType]:
    for model in MODELS:
        if importlib.util.find_spec(f"transformers.models.{model}") is not None:
            importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    for name, module in list(sys.modules.items()):
        if name.rpartition(".")[2].startswith("modeling_") and "torch_chunk_gated_delta_rule" in vars(module):
            yield module


def _fall_back(original: Function, name: str, reason: str) -> Function:
    """Returns what serves a call that flashdelta does not: the original, after the one warning."""
    message = f"flashdelta does not serve {name}: {reason}"
    if _strict:
        raise NotImplementedError(message)
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"{message}; transformers' own function runs instead", RuntimeWarning, stacklevel=4)
    return original


def _reason_against(operation: str, query: Tensor, value: Tensor, extra: dict[str, Any]) -> str | None:
    if is_torchdynamo_exporting():
        return "the model is being exported"
    unknown = sorted(key for key, given in extra.items() if key not in IGNORED_KEYWORDS and given is not None)
    if unknown:
        return f"unknown keyword {', '.join(unknown)}"
    return refusal(operation, query, value, gradients=query.requires_grad or value.requires_grad)


def _boundaries(tokens: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """Returns the [N + 1] ends of packed sequences; None where the input is not packed.

    Args:
        tokens: length of the packed buffer.
        cu_seqlens: [N + 1], wins if given.
        seq_idx: [1, T], a number per token that changes where a sequence begins.
    """
    if cu_seqlens is not None or seq_idx is None:
        return cu_seqlens
    if seq_idx.shape != (1, tokens):
        raise ValueError(
            f"seq_idx has shape {list(seq_idx.shape)}; expected [1, {tokens}]: packed sequences have batch size 1"
        )
    starts = (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero().flatten() + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), tokens)])


def _make_chunk(original: Function) -> Function:
    @functools.wraps(original)
    def torch_chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cu_seqlens = _boundaries(query.shape[1], cu_seqlens, kwargs.get("seq_idx"))
        options: dict[str, Any] = {
            "g": g,
            "beta": beta,
            "initial_state": initial_state,
            "output_final_state": output_final_state,
            "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
            "cu_seqlens": cu_seqlens,
        }
        reason = _reason_against("forward", query, value, kwargs)
        if reason is None:
            return chunk_gated_delta_rule(query, key, value, **options)
        serve = _fall_back(_on_this_device(original, query, cu_seqlens), "torch_chunk_gated_delta_rule", reason)
        result: tuple[Tensor, Tensor | None] = serve(query, key, value, chunk_size=chunk_size, **options, **kwargs)
        return result

    return torch_chunk_gated_delta_rule


def _make_recurrent(original: Function) -> Function:
    @functools.wraps(original)
    def torch_recurrent_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cu_seqlens = _boundaries(query.shape[1], cu_seqlens, kwargs.get("seq_idx"))
        options: dict[str, Any] = {
            "g": g,
            "beta": beta,
            "initial_state": initial_state,
            "output_final_state": output_final_state,
            "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
            "cu_seqlens": cu_seqlens,
        }
        reason = _reason_against("step", query, value, kwargs)
        if reason is None:
            return fused_recurrent_gated_delta_rule(query, key, value, **options)
        serve = _fall_back(_on_this_device(original, query, cu_seqlens), "torch_recurrent_gated_delta_rule", reason)
        result: tuple[Tensor, Tensor | None] = serve(query, key, value, **options, **kwargs)
        return result

    return torch_recurrent_gated_delta_rule


def _on_this_device(original: Function, query: Tensor, cu_seqlens: Tensor | None) -> Function:
    # transformers binds its name to FLA's Triton function wherever FLA is installed, and that one cannot run on a CPU. The
    # plain function underneath can, but it would silently ignore cu_seqlens, which the outer one refuses.
    return inspect.unwrap(original) if query.device.type == "cpu" and cu_seqlens is None else original


def _make_convolution(original: Function) -> Function:
    @functools.wraps(original)
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, D, T], weight [D, W], bias [D] -> [B, D, T]."""
        output: Tensor
        cu_seqlens, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
        ends = _boundaries(0 if seq_idx is None else seq_idx.shape[-1], cu_seqlens, seq_idx)
        if ends is None or is_torchdynamo_exporting():
            output = original(hidden_states, weight, bias, activation=activation, **kwargs)
            return output
        if hidden_states.shape[0] != 1:
            raise ValueError(f"packed sequences have batch size 1, got {hidden_states.shape[0]}")
        length, reach = hidden_states.shape[2], weight.shape[-1] - 1
        # A cache pads a prompt shorter than the filter with zeros on the left, which belong to no sequence.
        lead = length - int(ends[-1]) if length <= reach + 1 else 0
        # Each sequence moves right by the filter's reach times its number, into a buffer of zeros: no filter then sees two
        # sequences, whatever implementation runs.
        token = torch.arange(length, device=hidden_states.device)
        sequence = torch.searchsorted(ends[1:].to(token.dtype), token - lead, right=True)
        place = token + reach * sequence
        apart = hidden_states.new_zeros(1, hidden_states.shape[1], length + reach * (ends.shape[0] - 1))
        apart = apart.index_copy(2, place, hidden_states)
        kwargs = {key: given for key, given in kwargs.items() if key not in ("cu_seq_lens_q", "seq_idx")}
        output = original(apart, weight, bias, activation=activation, **kwargs)
        return output.index_select(2, place)

    return causal_conv1d_fn


_REPLACEMENTS: dict[str, Callable[[Function], Function]] = {
    "torch_chunk_gated_delta_rule": _make_chunk,
    "torch_recurrent_gated_delta_rule": _make_recurrent,
    "causal_conv1d_fn": _make_convolution,
}
