"""The model that decodes. Knows transformers, which is imported when one is made: its numbers are known without. Knows
nothing of caches, disks or measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ollm.plugin import ConfigurationError
from ollm_bench.checkpoints import check_fillable, read_config, weight_files
from ollm_bench.kv.records import Geometry
from ollm_bench.records import DTYPE_BYTES

_HIDDEN, _INTERMEDIATE, _VOCABULARY = 1024, 2816, 4096


def synthetic_geometry(layers: int, kv_heads: int, head_dim: int, dtype: str) -> Geometry:
    """Of a Llama with random weights and two query heads for each KV head."""
    size = DTYPE_BYTES[dtype]
    attention = _HIDDEN * head_dim * kv_heads * (2 * 2 + 2)  # queries and output are twice as wide as keys and values
    weights = layers * (attention + 3 * _HIDDEN * _INTERMEDIATE + 2 * _HIDDEN) + (2 * _VOCABULARY + 1) * _HIDDEN
    return Geometry(
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
        bytes_per_token=layers * kv_heads * head_dim * 2 * size, model_bytes=weights * size,
    )  # fmt: skip


def checkpoint_geometry(folder: Path, dtype: str | None) -> Geometry:
    """Of a checkpoint, from its config and the sizes of its files.

    Raises:
        ConfigurationError: when there is no config, no weights, or layers that only a real prompt can fill.
    """
    from ollm.plugin import kv_geometry

    text = read_config(folder).get_text_config(decoder=True)
    check_fillable(text, folder)
    weights = sum(path.stat().st_size for path in weight_files(folder))
    name = dtype or str(getattr(text, "dtype", None) or torch.float32).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigurationError(f"--model {folder}: its dtype is {name}; say --dtype {' or '.join(DTYPE_BYTES)}.")
    stored = kv_geometry(text, getattr(torch, name))
    first = stored.layers[0]
    return Geometry(
        layers=len(stored.layers), kv_heads=first.kv_heads, head_dim=first.key_size, dtype=name,
        bytes_per_token=stored.bytes_per_token, model_bytes=weights, model=str(folder),
    )  # fmt: skip


def make_model(geometry: Geometry, tokens: int) -> Any:
    """The model on the CPU, for contexts of `tokens`."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, geometry.dtype)
    if geometry.model is not None:
        return AutoModelForCausalLM.from_pretrained(geometry.model, local_files_only=True, dtype=dtype).eval()
    heads = geometry.kv_heads * 2
    config = LlamaConfig(
        hidden_size=_HIDDEN, intermediate_size=_INTERMEDIATE, num_hidden_layers=geometry.layers,
        num_attention_heads=heads, num_key_value_heads=geometry.kv_heads, head_dim=geometry.head_dim,
        vocab_size=_VOCABULARY, max_position_embeddings=max(tokens, 2048),
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):  # else the weights exist in float32 first
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
    return model
