"""Caches full of random keys and values, and steps of generation over them. Knows transformers; measures nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollm.plugin import kv_geometry

_PIECE_BYTES = 16 * 2**20
_LEAST_PIECE, _MOST_PIECE = 1024, 4096

TOKEN = 7
"""Any: with random weights all mean as little."""


def decode_one(model: Any, cache: Any, rows: int = 1) -> None:
    """One step of generation: a single token for each row, attending to all that the cache holds."""
    mask = torch.ones(rows, int(cache.get_seq_length()) + 1, dtype=torch.long)
    model(torch.full((rows, 1), TOKEN), attention_mask=mask, past_key_values=cache)


def piece_tokens(layer_bytes: int) -> int:
    """How many tokens at a time a cache on disk is filled with, as prompts come, but of a bounded size: from the bytes
    of one token in one layer."""
    return max(_LEAST_PIECE, min(_MOST_PIECE, _PIECE_BYTES // layer_bytes))


def fill_by_pieces(
    cache: Any, model: Any, keys: Tensor, values: Tensor, tokens: int, done: Callable[[float], None]
) -> None:
    """Give every layer a piece, then every layer the next one, as a prompt in chunks does."""
    layers = _config(model).num_hidden_layers
    piece = keys.shape[2]
    for start in range(0, tokens, piece):
        count = min(piece, tokens - start)
        for layer in range(layers):
            cache.update(keys[:, :, :count], values[:, :, :count], layer)
        done((start + count) / tokens)


def fill_by_layers(cache: Any, model: Any, keys: Tensor, values: Tensor, done: Callable[[float], None]) -> None:
    """Give every layer all of its tokens at once, so that no cache grows by copying itself."""
    layers = _config(model).num_hidden_layers
    for layer in range(layers):
        cache.update(keys, values, layer)
        done((layer + 1) / layers)


def random_keys_and_values(model: Any, tokens: int) -> Iterator[Tensor]:
    """Keys, then values, of one layer."""
    stored = kv_geometry(_config(model), model.dtype).layers[0]
    for size in (stored.key_size, stored.value_size):
        yield torch.randn(1, stored.kv_heads, tokens, size, dtype=model.dtype)


def wait_for_disk(directory: Path) -> None:
    """Until the disk has all files below it: writes that wait in the kernel's cache would slow what is measured next,
    or be faster than any disk themselves."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
