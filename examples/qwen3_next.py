#!/usr/bin/env python3
"""Runs Hugging Face's Qwen3-Next on flashdelta: two lines, and the same model generates the same text faster.

    python examples/qwen3_next.py

The model is small and its weights are random, so there is nothing to download; a checkpoint works the same way.
"""

from __future__ import annotations

import inspect
import time

import torch
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

import flashdelta.integrations.transformers

PROMPT, GENERATED = 512, 16


def generate(model: Qwen3NextForCausalLM, prompt: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns (the generated tokens [GENERATED], their logits [GENERATED, vocabulary], seconds)."""
    model(prompt)
    start = time.perf_counter()
    output = model.generate(
        prompt, max_new_tokens=GENERATED, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return output.sequences[0, PROMPT:], torch.cat(output.logits), time.perf_counter() - start


def main() -> int:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3NextForCausalLM(config).eval()
    prompt = torch.randint(512, (1, PROMPT))

    # On a CPU compare with transformers' PyTorch functions, even where its decorators found FLA, which needs a GPU.
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        setattr(modeling_qwen3_next, name, inspect.unwrap(getattr(modeling_qwen3_next, name)))
    tokens, logits, seconds = generate(model, prompt)

    flashdelta.integrations.transformers.enable()
    our_tokens, our_logits, our_seconds = generate(model, prompt)
    flashdelta.integrations.transformers.disable()

    same = torch.equal(tokens, our_tokens)
    error = ((our_logits - logits).abs().max() / logits.square().mean().sqrt()).item()
    print(f"prompt of {PROMPT} tokens, {GENERATED} generated")
    print(f"transformers {seconds:.2f} s, with flashdelta {our_seconds:.2f} s")
    print(f"the tokens are {'the same' if same else 'NOT the same'}; logits differ by {error:.1e} of their rms")
    return 0 if same and error <= 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
