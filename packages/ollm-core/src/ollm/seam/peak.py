"""How much memory a prompt takes on its way through a model, beside the weights, and how long it may therefore be.

An estimate from the config. Knows sizes, not caches or streamers.
"""

from __future__ import annotations

from typing import Any

from ollm.seam.geometry import kv_geometry, largest
from ollm.seam.prefill import activation_bytes

_HIDDEN_COPIES = 3
"""Of the whole prompt's hidden states: what goes into a layer, what came out of it in pieces, and these joined."""
_FEWEST_TOKENS = 256
_SHARE = 2
"""A prompt may take one part in so many of what is free; the rest is for keys and values that stay in memory."""


def prefill_bytes(config: Any, dtype: Any, tokens: int, piece: int | None) -> int:
    """About the most memory that a prefill takes above weights and what the cache keeps resident.

    Args:
        config: of the text decoder.
        dtype: of the activations.
        tokens: of all rows of the prompt that go through in one forward pass.
        piece: how many of them a layer takes at once (`KVCache.piece_tokens`); `None` for all of them.
    """
    activations = min(tokens, piece or tokens) * activation_bytes(config, dtype.itemsize)
    return tokens * _bytes_per_token(config, dtype) + activations


def longest_prompt(config: Any, dtype: Any, piece: int | None, free_bytes: int) -> int:
    """How many tokens, of all rows, may go through in one forward pass, given what is free."""
    budget = free_bytes // _SHARE
    per_token = _bytes_per_token(config, dtype)
    activations = activation_bytes(config, dtype.itemsize)
    if piece is None or budget < piece * (per_token + activations):
        tokens = budget // (per_token + activations)
    else:
        tokens = (budget - piece * activations) // per_token
    return int(max(tokens, _FEWEST_TOKENS))


def _bytes_per_token(config: Any, dtype: Any) -> int:
    """What is kept of every token of the prompt while a layer works through it."""
    hidden = largest(config, "hidden_size") or 0
    # keys and values of the layer at work, before and after they are put together for its later pieces
    kept = max((layer.bytes_per_token for layer in kv_geometry(config, dtype).layers), default=0) * 2
    head = largest(config, "head_dim") or hidden // (largest(config, "num_attention_heads") or 1)
    rotary = 2 * head * 4
    return int(hidden * dtype.itemsize * _HIDDEN_COPIES + kept + rotary)
