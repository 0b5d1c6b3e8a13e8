"""When a tail is flushed, and into how many extents: arithmetic on what policy and store want. Knows no tensors."""

from __future__ import annotations

from ollm.contracts.spill import SpillPlan


def tokens_to_flush(plan: SpillPlan, extent_tokens: int | None, token_bytes: int, *, pending: int, short: int) -> int:
    """How many tokens go to the store now, from the first of the short extent on; 0 for none.

    A store that wants extents of a certain size gets whole ones, as soon as there is one; a shorter one only where the
    tail would otherwise take more memory than the plan allows.

    Args:
        plan: when to flush, and what stays hot.
        extent_tokens: what the store wants, if it wants something.
        token_bytes: of keys and values of one token of all rows.
        pending: tokens that are not stored: the tail and what comes behind it.
        short: tokens of a last extent that can grow, and is written anew then.
    """
    most = (plan.flush_bytes - 1) // token_bytes  # that may stay in the tail
    hot = min(plan.hot_tokens, most // 2)  # what stays leaves room for more, so that extents do not become tiny
    if pending < (extent_tokens or plan.flush_tokens) and pending <= most:
        return 0
    flush = max(pending - hot, 0)
    if extent_tokens is None or flush == 0:
        return flush
    whole = (short + flush) // extent_tokens * extent_tokens
    if pending - max(whole - short, 0) > most:
        return short + flush
    return whole if whole > short else 0


def cuts(tokens: int, most: int) -> list[tuple[int, int]]:
    """Split so many tokens into pieces of at most `most`, all but the last as long as that."""
    return [(start, min(start + most, tokens)) for start in range(0, tokens, most)]


def even(tokens: int, most: int) -> int:
    """The size of pieces of at most `most` tokens that are about equal."""
    return -(-tokens // -(-tokens // most))
