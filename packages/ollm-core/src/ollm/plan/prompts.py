"""How long a prompt may be that goes through a model in one forward pass. Decides by sizes and what is free, and knows
neither caches nor weights."""

from __future__ import annotations

from ollm.plan.facts import ModelFacts

_FEWEST_TOKENS = 256
_SHARE = 2
"""A prompt may take one part in so many of what is free; the rest is for keys and values that stay in memory."""


def longest_prompt(model: ModelFacts, piece_tokens: int | None, free_bytes: int) -> int:
    """How many tokens, of all rows, may go through in one forward pass.

    Args:
        model: what goes through.
        piece_tokens: how many of them a layer takes at once; `None` for all of them.
        free_bytes: what is free on the model's device, beside its weights.
    """
    budget, kept = free_bytes // _SHARE, model.prompt_bytes
    if piece_tokens is None or budget < piece_tokens * (kept + model.activation_bytes):
        tokens = budget // (kept + model.activation_bytes)
    else:
        tokens = (budget - piece_tokens * model.activation_bytes) // kept
    return max(tokens, _FEWEST_TOKENS)
