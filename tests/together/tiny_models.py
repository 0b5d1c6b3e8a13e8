"""Tiny random models of the families that differ in how they cache, in fp32 so that tokens must be identical.

Weights are drawn widely enough that greedy output is no single repeated token.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig, LlamaConfig, Qwen3Config, Qwen3NextConfig

VOCABULARY = 199
SLIDING_WINDOW = 16
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.25,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,  # tied, Gemma repeats its last input
}
_MIXED = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": lambda: LlamaConfig(num_hidden_layers=3, **_COMMON),
    "qwen3": lambda: Qwen3Config(num_hidden_layers=3, **_COMMON),
    "gemma3": lambda: Gemma3TextConfig(
        num_hidden_layers=4, layer_types=_MIXED, sliding_window=SLIDING_WINDOW, query_pre_attn_scalar=16, **_COMMON
    ),
    "gpt_oss": lambda: GptOssConfig(
        num_hidden_layers=4,
        layer_types=_MIXED,
        sliding_window=SLIDING_WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        **_COMMON,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        **_COMMON,
    ),
}
FAMILIES = tuple(CONFIGS)
RECURRENT = ("qwen3_next",)


def make_model(family: str, seed: int = 3):
    """A model of one family, always the same one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # generate as many tokens as asked for
    return model
