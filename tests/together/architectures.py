"""Every causal architecture that transformers has, as a tiny random model made from its config class alone.

The settings are generic: each config takes those that it knows. Architectures that cannot be made so small or so
generically are left out; the survey lists them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {
    "vocab_size": 101, "max_position_embeddings": 512, "n_positions": 512, "initializer_range": 0.3,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "rotary_dim": 8,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "hidden_act": "silu", "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MLA = {"head_dim": 8, "num_key_value_heads": 4}
"""Latent attention: every head has keys of its own, and `head_dim` is that of the rotary part."""
OVERRIDES: dict[str, dict[str, Any]] = dict.fromkeys(
    (
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "longcat_flash",
        "minicpm3",
        "youtu",
    ),
    MLA,
)

_SPECIAL = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_STATE_SPACE = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, **_SPECIAL}
EXACT: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_chunk_size": 16, "initializer_range": 0.3, **_SPECIAL,
    },
    "falcon_mamba": _STATE_SPACE,
    "mamba": _STATE_SPACE,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, **_STATE_SPACE},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local"], "axial_pos_embds": False, "local_attn_chunk_length": 16,
        "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 48, **_SPECIAL,
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, **_SPECIAL},
    "zamba2": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8,
        "mamba_ngroups": 1, "num_mem_blocks": 1, "chunk_size": 16, "initializer_range": 0.3,
        "layers_block_type": ["linear_attention", "hybrid"] * 2, **_SPECIAL,
    },
    "xlstm": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "qk_dim_factor": 1.0, **_SPECIAL},
}  # fmt: skip
"""Those for which generic settings do not do."""

WITHOUT_CACHE = (
    "falcon_mamba", "mamba", "mamba2", "minimax", "openai-gpt", "reformer", "rwkv", "xlm", "xlnet", "xlstm",
)  # fmt: skip
"""What `disk_cache` refuses of those that can be made."""

TESTED = (
    "apertus", "arcee", "bart", "biogpt", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "diffllama",
    "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "granite", "granitemoe", "helium", "jetmoe", "llama", "minimax_m2", "ministral",
    "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip
"""What the test suite runs; `make survey` runs all that can be made."""


def make(model_type: str) -> Any:
    """A tiny model of one type, in fp32, always the same one."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    settings = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    settings = EXACT.get(model_type, {**settings, **OVERRIDES.get(model_type, {})})
    kinds = None if model_type in EXACT else getattr(default, "layer_types", None)
    if kinds is not None:  # at least one layer of every kind
        distinct = list(dict.fromkeys(kinds))
        settings["layer_types"] = (distinct * 2)[: max(2, len(distinct))]
        settings["num_hidden_layers"] = len(settings["layer_types"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model
