"""The model that decodes, and filling its caches. Knows transformers; knows nothing of disks or measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ollm.bench.records import DTYPE_BYTES, Geometry
from ollm.errors import ConfigurationError
from ollm.seam.geometry import STORED_LAYER_TYPE, decoder_config, kv_geometry, layer_types

_PIECE_BYTES = 16 * 2**20
_LEAST_PIECE, _MOST_PIECE = 1024, 4096
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
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--model {folder}: its config cannot be read: {error}") from error
    text = config.get_text_config(decoder=True)
    kinds = {kind for kind, _ in layer_types(text)}
    if kinds != {STORED_LAYER_TYPE}:
        raise ConfigurationError(
            f"--model {folder}: it has layers of type {', '.join(sorted(kinds))}, and only full attention can be "
            "filled with random keys and values. Give a model whose layers all have full attention, such as a Llama."
        )
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not weights:
        raise ConfigurationError(f"--model {folder}: it holds no *.safetensors. Give the folder of a whole checkpoint.")
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


def decode_one(model: Any, cache: Any, rows: int = 1) -> None:
    """One step of generation: a single token for each row, attending to all that the cache holds."""
    mask = torch.ones(rows, int(cache.get_seq_length()) + 1, dtype=torch.long)
    model(torch.full((rows, 1), 7), attention_mask=mask, past_key_values=cache)


def piece_tokens(geometry: Geometry) -> int:
    """How many tokens at a time a cache on disk is filled with: as prompts come, but of a bounded size."""
    return max(_LEAST_PIECE, min(_MOST_PIECE, _PIECE_BYTES // geometry.layer_bytes(1)))


def fill_by_pieces(
    cache: Any, model: Any, keys: Tensor, values: Tensor, tokens: int, done: Callable[[float], None]
) -> None:
    """Give every layer a piece, then every layer the next one, as a prompt in chunks does."""
    layers = decoder_config(model).num_hidden_layers
    piece = keys.shape[2]
    for start in range(0, tokens, piece):
        count = min(piece, tokens - start)
        for layer in range(layers):
            cache.update(keys[:, :, :count], values[:, :, :count], layer)
        done((start + count) / tokens)


def fill_by_layers(cache: Any, model: Any, keys: Tensor, values: Tensor, done: Callable[[float], None]) -> None:
    """Give every layer all of its tokens at once, so that no cache grows by copying itself."""
    layers = decoder_config(model).num_hidden_layers
    for layer in range(layers):
        cache.update(keys, values, layer)
        done((layer + 1) / layers)


def random_keys_and_values(model: Any, tokens: int) -> Iterator[Tensor]:
    """Keys, then values, of one layer."""
    stored = kv_geometry(decoder_config(model), model.dtype).layers[0]
    for size in (stored.key_size, stored.value_size):
        yield torch.randn(1, stored.kv_heads, tokens, size, dtype=model.dtype)
